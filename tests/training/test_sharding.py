"""The helpers on whole tensors; tests/distributed/test_fsdp_policy.py has them on sharded ones."""

from __future__ import annotations

import torch
from torch import nn

from dina_reward.training.sharding import (
    ExactTimesteps,
    assign,
    exchange,
    is_main_process,
    local,
    reshard,
    slice_like,
    trainable_parameters,
    whole,
)


def test_whole_tensors_pass_through():
    tensor = torch.randn(3, 2, requires_grad=True)
    assert whole(tensor).data_ptr() == local(tensor).data_ptr() == tensor.data_ptr()
    assert not whole(tensor).requires_grad
    assert slice_like(torch.ones(3, dtype=torch.float64), torch.zeros(3)).dtype == torch.float32
    assert is_main_process()


def test_assign_casts_and_writes_in_place():
    target = nn.Parameter(torch.zeros(2))
    address = target.data_ptr()
    assign(target, torch.tensor([1.0, 2.0], dtype=torch.float64))
    assert target.tolist() == [1.0, 2.0]
    assert target.data_ptr() == address


def test_exchange_twice_is_nothing():
    parameter, other = nn.Parameter(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 4.0])
    version = parameter._version
    exchange([parameter], [other])
    assert (parameter.tolist(), other.tolist()) == ([3.0, 4.0], [1.0, 2.0])
    exchange([parameter], [other])
    assert (parameter.tolist(), other.tolist()) == ([1.0, 2.0], [3.0, 4.0])
    assert parameter._version == version


def test_trainable_parameters_keep_their_order():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].bias.requires_grad_(False)
    reshard(model)
    assert list(trainable_parameters(model)) == ["0.weight", "1.weight", "1.bias"]


def test_timesteps_survive_a_cast_of_all_inputs():
    class Model(nn.Module):
        def forward(self, latents, timestep, *, guidance, tokens=None):
            return latents.dtype, timestep, guidance, tokens

    def cast(module, args, kwargs):
        return tuple(a.bfloat16() for a in args), {k: v.bfloat16() for k, v in kwargs.items()}

    model = Model()
    model.register_forward_pre_hook(cast, with_kwargs=True)
    ExactTimesteps(model)
    dtype, timestep, guidance, tokens = model(
        torch.zeros(1, 2), torch.tensor([987.3]), guidance=torch.tensor(3.51), tokens=torch.zeros(1, 2, 3)
    )
    assert dtype == tokens.dtype == torch.bfloat16
    assert timestep.item() == torch.tensor(987.3).item()
    assert guidance.item() == torch.tensor(3.51).item()
