"""Shards a tiny policy over two ranks as accelerate's FSDP2 does, trains one step and writes what came out.

A job of together.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from dina_reward.alignment.policy import Policy
from dina_reward.training.ema import EMACallback
from tests.alignment.tiny_policy import denoising_loss, make_policy, velocity_of


KINDS: dict[str, dict[str, Any]] = {"lora": {"rank": 3}, "full": {"train_full_model": True, "keep_reference": True}}
LEARNING_RATE = 0.5


def step(policy: Policy, rows: slice) -> None:
    """One step of gradient descent, which keeps rounding errors in proportion."""
    optimizer = torch.optim.SGD(policy.trainable_parameters().values(), lr=LEARNING_RATE)
    denoising_loss(policy, rows).backward()
    optimizer.step()


def ema_of(policy: Policy) -> EMACallback:
    """A moving average of the policy, after the update that ends its first step."""
    callback, state, control = EMACallback(policy.denoiser, decay=0.9), TrainerState(), TrainerControl()
    arguments = TrainingArguments(use_cpu=True, report_to="none")
    callback.on_train_begin(arguments, state, control)
    callback.on_step_end(arguments, state, control)
    return callback


def ema_step(callback: EMACallback) -> None:
    state = TrainerState()
    state.global_step = 1
    callback.on_step_end(TrainingArguments(use_cpu=True, report_to="none"), state, TrainerControl())


def shard(policy: Policy, dtype: torch.dtype | None = None) -> None:
    """Blocks, the final norm and the rest, as `accelerate.utils.fsdp_utils.fsdp2_prepare_model` groups them."""
    settings: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, output_dtype=dtype)}
    for block in policy.denoiser.transformer_blocks:
        fully_shard(block, reshard_after_forward=True, **settings)
    fully_shard([policy.denoiser.norm_out], reshard_after_forward=False, **settings)
    fully_shard(policy.denoiser, **settings)


def run(kind: str, directory: Path, rank: int) -> dict[str, Any]:
    policy = make_policy(**KINDS[kind])
    before = velocity_of(policy)
    if kind == "lora":
        torch.nn.init.normal_(policy.denoiser.transformer_blocks[0].attn.to_q.lora_B["policy"].weight, std=0.1)
    shard(policy)
    assert isinstance(policy.denoiser, FSDPModule)
    forward = velocity_of(policy)
    # After a forward pass without gradient the root is gathered; its parameters must be found sharded all the same.
    assert all(isinstance(p, DTensor) for p in policy.trainable_parameters().values())
    sharded = sum(t.numel() for t in policy.snapshot()), sum(p.numel() for p in policy.trainable_parameters().values())

    average = ema_of(policy)
    old = policy.snapshot()
    velocity_of(policy)
    step(policy, slice(rank, rank + 1))
    ema_step(average)
    trained, after = policy.snapshot(), velocity_of(policy)
    with policy.reference():
        reference = velocity_of(policy)
    with policy.use_weights(old):
        returned = velocity_of(policy)
    with average.average_parameters():
        averaged = velocity_of(policy)
    restored = all(torch.equal(a, b) for a, b in zip(trained, policy.snapshot(), strict=True))
    assert torch.equal(velocity_of(policy), after)

    folder = directory / kind
    folder.mkdir(exist_ok=True)
    policy.save_weights(str(folder))
    average.save_state(str(folder))
    torch.distributed.barrier()
    results: dict[str, Any] = {
        "before": before,
        "forward": forward,
        "after": after,
        "reference": reference,
        "returned": returned,
        "averaged": averaged,
        "restored": restored,
        "sharded": sharded,
    }
    return {**results, **reload(policy, average, folder, trained)}


def reload(policy: Policy, average: EMACallback, folder: Path, trained: list[Tensor]) -> dict[str, Any]:
    """Spoils all trained tensors and reads the files back."""
    zeros = [torch.zeros_like(tensor) for tensor in trained]
    with policy.use_weights(zeros):
        policy.load_weights(str(folder))
        loaded = all(torch.equal(a, b) for a, b in zip(trained, policy.snapshot(), strict=True))
    again = EMACallback(policy.denoiser, decay=0.9)
    again.load_state(str(folder))
    with average.average_parameters():
        expected = policy.snapshot()
    with again.average_parameters():
        averages = all(torch.equal(a, b) for a, b in zip(expected, policy.snapshot(), strict=True))
    return {"loaded": loaded, "averages_loaded": averages}


def mixed_precision() -> dict[str, Any]:
    """What the time embedding of a bfloat16 policy under FSDP2's mixed precision is told, and the dtypes it trains in."""
    policy = make_policy(dtype=torch.bfloat16)
    shard(policy, torch.bfloat16)
    seen: list[Tensor] = []
    policy.denoiser.time_text_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    predict = policy.bind(policy.encode(["a cat"], torch.device("cpu")), None)
    prediction = predict(torch.randn(1, 16, 4, 4), torch.tensor([987.3]))
    prediction.square().mean().backward()
    parameters = policy.trainable_parameters().values()
    return {
        "timestep": seen[0],
        "prediction_dtype": str(prediction.dtype),
        "dtypes": sorted({str(t.dtype) for p in parameters for t in (p, p.grad) if t is not None}),
        "gradient": sum(p.grad.full_tensor().abs().sum() for p in parameters if p.grad is not None),
    }


def work(output: Path) -> None:
    process = torch.distributed.get_rank()
    torch.save(
        {**{kind: run(kind, output, process) for kind in KINDS}, "mixed": mixed_precision()},
        output / f"rank{process}.pt",
    )
