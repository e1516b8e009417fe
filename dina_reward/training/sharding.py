"""Whole tensors from sharded parameters and back (FSDP2's `DTensor`), the same calls for parameters that are whole.

Under FSDP2 (`torch.distributed.fsdp.fully_shard`) every rank holds a slice of each parameter. What is written to disk are
whole tensors, gathered on all ranks; what is kept per rank (snapshots, moving averages) are slices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn


def is_main_process() -> bool:
    """Whether this process is rank 0, or the only one."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name; under FSDP2 in their sharded form, which is the one that is trained.

    Raises:
        ValueError: the parameters are partitioned by DeepSpeed's ZeRO-3.
    """
    reshard(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name!r} is partitioned by DeepSpeed ZeRO-3, which is not supported; use ZeRO-2, or FSDP2 for models "
                "whose weights do not fit on one device"
            )
    return parameters


def reshard(model: nn.Module) -> None:
    """Frees the whole parameters that FSDP2 has gathered for a forward pass.

    FSDP2 leaves those of the root module gathered after a forward pass without gradient. They would hide the sharded
    parameters from `named_parameters`, and outlive a change to them.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank; all ranks have to call this together."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This rank's slice as a plain tensor that shares its storage; the tensor itself when it is not sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def slice_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's slice of a whole tensor, as ``like`` is sharded, with its dtype and device; all ranks call together."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements).to_local()


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Writes a whole tensor into a possibly sharded one, in place; all ranks have to call this together."""
    local(target).copy_(slice_like(value, target))


@torch.no_grad()
def exchange(parameters: Iterable[Tensor], tensors: Iterable[Tensor]) -> None:
    """Swaps the contents of parameters and of tensors of the same dtypes, one pair at a time.

    Autograd does not see it: a graph recorded before the swap stays valid once the contents are swapped back.
    """
    for parameter, tensor in zip(parameters, tensors, strict=True):
        values = local(parameter).data
        kept = values.clone()
        values.copy_(tensor)
        tensor.copy_(kept)


def keep_scores_exact(plugin: Any) -> None:
    """Makes FSDP2's mixed precision leave outputs as they are and add gradients in float32, as autocast under DDP does.

    accelerate would round both to bfloat16, in which scores of similar latents are equal.

    Args:
        plugin: accelerate's FSDP plugin, before anything is sharded; nothing happens without mixed precision.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def compute_by_autocast(config: dict[str, Any]) -> None:
    """Makes DeepSpeed compute in bfloat16 by autocast, over float32 parameters and gradients, as it is done under DDP.

    Its own bfloat16 mode rounds LoRA, head and every input to bfloat16, in which scores of similar latents are equal.

    Args:
        config: DeepSpeed's configuration, before its engine is made.
    """
    config["bf16"] = {"enabled": False}
    config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


class ExactTimesteps:
    """Keeps timesteps in float32 where FSDP2's mixed precision would round every floating-point input.

    With ``param_dtype=torch.bfloat16`` the root module casts its inputs, so that a timestep of 987.3 becomes 988: another
    model than the one at inference. Inputs with at most one dimension are put back after the cast.

    Args:
        model: the root module, already sharded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        # The first runs before FSDP's own hook, the second after it.
        model.register_forward_pre_hook(self._keep, prepend=True, with_kwargs=True)
        model.register_forward_pre_hook(self._put_back, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inputs = (args, kwargs)

    def _put_back(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (old_args, old_kwargs), self._inputs = self._inputs, ((), {})
        exact_args = tuple(_exact(old, new) for old, new in zip(old_args, args, strict=True))
        return exact_args, {name: _exact(old_kwargs[name], new) for name, new in kwargs.items()}


def _exact(before: Any, after: Any) -> Any:
    return before if isinstance(before, Tensor) and before.ndim <= 1 else after


def keep_frozen_from_ddp(module: nn.Module) -> None:
    """Keeps DDP from writing the first rank's frozen tensors over those of the others, which hold the same already.

    A reward that shares them with a generator would take the writing for a change.
    """
    named = [*module.named_parameters(), *module.named_buffers()]
    # What `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model` sets.
    module._ddp_params_and_buffers_to_ignore = [name for name, tensor in named if not tensor.requires_grad]  # type: ignore[assignment]
