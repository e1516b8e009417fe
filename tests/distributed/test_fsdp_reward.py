"""A reward whose backbone FSDP2 shards over two gloo processes against the same reward in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor


pytest.importorskip("torch.distributed.fsdp", reason="this torch has no fully_shard")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo, and FSDP2 on the CPU needs it", allow_module_level=True)

from dina_reward import LatentReward
from dina_reward.training.ema import EMA_WEIGHTS_NAME
from tests.distributed.reward_fsdp_worker import ARGUMENTS, metrics_of
from tests.tiny_models import tiny_sd3_pipeline
from tests.training.tiny_reward import separable_pairs, tiny_trainer, trained_parameters


pytestmark = pytest.mark.distributed
JOB = "fsdp_reward"


@pytest.fixture(scope="module")
def two_ranks(two_processes: Callable[[str], Path]) -> tuple[Path, list[dict[str, Tensor]]]:
    directory = two_processes(JOB)
    return directory, [load_file(directory / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], Tensor]:
    directory = tmp_path_factory.mktemp("one")
    trainer = tiny_trainer(directory, per_device_train_batch_size=8, **ARGUMENTS)
    trainer.train()
    return directory, trained_parameters(trainer), metrics_of(trainer)


def test_each_rank_holds_half_of_the_model(two_ranks: tuple[Path, list[dict[str, Tensor]]]) -> None:
    shares = [rank["share"].item() for rank in two_ranks[1]]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert all(0.3 < share < 0.7 for share in shares)


def test_training_equals_one_process_with_the_double_batch(two_ranks, one_rank) -> None:
    _, parameters, _ = one_rank
    for rank in two_ranks[1]:
        for name, parameter in parameters.items():
            torch.testing.assert_close(rank[f"parameter/{name}"], parameter, rtol=1e-4, atol=1e-6)


def test_metrics_and_averaged_evaluation_equal_those_of_one_process(two_ranks, one_rank) -> None:
    for rank in two_ranks[1]:
        torch.testing.assert_close(rank["metrics"], one_rank[2], rtol=1e-4, atol=1e-5)


def test_checkpoints_are_whole_rewards_without_the_backbone(two_ranks, one_rank) -> None:
    directory, ranks = two_ranks
    names = {path.name for path in (directory / "checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "head.safetensors", "optimizer_0", "scheduler.pt", "rng_state_1.pth"} <= names
    assert not any("model_fsdp" in name for name in names)
    pipeline, latents = tiny_sd3_pipeline(), separable_pairs(4).chosen
    for place in ("checkpoint-3", "final"):
        head = load_file(directory / place / "head.safetensors")
        same = [torch.equal(head[name], ranks[0][f"parameter/head.{name}"]) for name in head]
        assert all(same) if place == "checkpoint-3" else not all(same)  # the final one is the average
    loaded = LatentReward.from_pretrained(directory / "checkpoint-3", pipeline=pipeline)
    expected = LatentReward.from_pretrained(one_rank[0] / "checkpoint-3", pipeline=pipeline)
    scores = [reward(latents, "a red circle", seed=0) for reward in (loaded, expected)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_average_is_saved_whole(two_ranks, one_rank) -> None:
    sharded, whole = (load_file(path / "checkpoint-3" / EMA_WEIGHTS_NAME) for path in (two_ranks[0], one_rank[0]))
    assert sharded.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=1e-4, atol=1e-6)


def test_resume_equals_the_uninterrupted_run(two_ranks) -> None:
    for rank in two_ranks[1]:
        for name in [name for name in rank if name.startswith("parameter/")]:
            torch.testing.assert_close(rank[f"resumed/{name}"], rank[name], rtol=0, atol=1e-7)


def test_mixed_precision_rounds_neither_timesteps_nor_scores(two_ranks) -> None:
    for rank in two_ranks[1]:
        for name in ("timesteps", "scores"):
            values = rank[f"mixed/{name}"]
            assert values.dtype == torch.float32
            assert not torch.equal(values, values.bfloat16().float())
        assert 0 < rank["mixed/moved"] < 1
        assert rank["mixed/metrics"].isfinite().all()
