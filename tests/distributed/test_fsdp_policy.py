"""A policy sharded by FSDP2 over two gloo processes against the same policy in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dina_reward.alignment.policy import Policy
from dina_reward.training.ema import EMA_WEIGHTS_NAME
from tests.alignment.tiny_policy import generate, make_policy, tiny_pipeline, velocity_of


pytest.importorskip("torch.distributed.fsdp", reason="this torch has no fully_shard")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo, and FSDP2 on the CPU needs it", allow_module_level=True)

from tests.distributed.fsdp_worker import KINDS, ema_of, ema_step, step


pytestmark = pytest.mark.distributed
JOB = "fsdp_policy"


@pytest.fixture(scope="module")
def two_ranks(two_processes: Callable[[str], Path]) -> tuple[Path, list[dict[str, Any]]]:
    directory = two_processes(JOB)
    return directory, [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def one_rank(kind: str) -> dict[str, Any]:
    """The unsharded policy before and after a step over both rows, with its moving average."""
    policy = make_policy(**KINDS[kind])
    before = velocity_of(policy)
    if kind == "lora":
        torch.nn.init.normal_(policy.denoiser.transformer_blocks[0].attn.to_q.lora_B["policy"].weight, std=0.1)
    forward, average = velocity_of(policy), ema_of(policy)
    step(policy, slice(0, 2))
    ema_step(average)
    after = velocity_of(policy)
    with average.average_parameters():
        averaged = velocity_of(policy)
    return {"policy": policy, "before": before, "forward": forward, "after": after, "averaged": averaged}


def close(value: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_each_rank_holds_half(two_ranks, kind):
    parts = [rank[kind]["sharded"] for rank in two_ranks[1]]
    assert parts[0][1] == parts[1][1] == parts[0][0] + parts[1][0]
    assert 0.3 < parts[0][0] / parts[0][1] < 0.7


def test_forward_equals_the_unsharded_model(two_ranks, one_rank, kind):
    for rank in two_ranks[1]:
        close(rank[kind]["forward"], one_rank["forward"])


def test_one_step_equals_the_unsharded_step(two_ranks, one_rank, kind):
    moved = (one_rank["after"] - one_rank["forward"]).abs().max()
    assert moved > 1e-3
    for rank in two_ranks[1]:
        close(rank[kind]["after"], one_rank["after"])


def test_snapshot_reference_and_average_are_seen_by_the_forward_pass(two_ranks, one_rank, kind):
    assert (one_rank["averaged"] - one_rank["after"]).abs().max() > 1e-4
    for rank in two_ranks[1]:
        results = rank[kind]
        assert torch.equal(results["returned"], results["forward"])
        close(results["reference"], one_rank["before"])
        close(results["averaged"], one_rank["averaged"])
        assert results["restored"]


def test_files_hold_whole_tensors_and_load_in_one_process(two_ranks, one_rank, kind):
    directory, ranks = two_ranks
    policy: Policy = make_policy(**KINDS[kind])
    policy.load_weights(str(directory / kind))
    close(velocity_of(policy), ranks[0][kind]["after"])
    for loaded, expected in zip(policy.snapshot(), one_rank["policy"].snapshot(), strict=True):
        close(loaded, expected)
    averages = load_file(directory / kind / EMA_WEIGHTS_NAME)
    shapes = {name: p.shape for name, p in policy.trainable_parameters().items()}
    assert {name: tensor.shape for name, tensor in averages.items()} == shapes


def test_files_load_into_the_shards_again(two_ranks, kind):
    for rank in two_ranks[1]:
        assert rank[kind]["loaded"]
        assert rank[kind]["averages_loaded"]


def test_plain_diffusers_reads_the_files(two_ranks):
    from diffusers import SD3Transformer2DModel

    directory, _ = two_ranks
    config = json.loads((directory / "full" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "SD3Transformer2DModel"  # not FSDP's own class
    loaded = SD3Transformer2DModel.from_pretrained(directory / "full", subfolder="transformer")
    assert torch.equal(
        loaded.proj_out.weight, load_file(next((directory / "full").rglob("*model.safetensors")))["proj_out.weight"]
    )
    pipeline = tiny_pipeline()
    before = generate(pipeline)
    pipeline.load_lora_weights(str(directory / "lora"))
    assert not torch.allclose(generate(pipeline), before)


def test_mixed_precision_does_not_round_timesteps(two_ranks):
    for rank in two_ranks[1]:
        mixed = rank["mixed"]
        assert mixed["timestep"].tolist() == pytest.approx([987.3], abs=1e-3)
        assert mixed["prediction_dtype"] == "torch.float32"
        assert mixed["dtypes"] == ["torch.float32"]
        assert mixed["gradient"] > 0
