"""Two gloo processes against one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward.alignment.monitoring.evaluation import HISTORY_NAME, read_history
from dina_reward.planning import traffic_of
from tests.alignment.helpers import lora_tensors, tiny_trainer
from tests.distributed.grpo_worker import run


pytestmark = pytest.mark.distributed
JOB = "grpo"


@pytest.fixture(scope="module")
def two_ranks(two_processes: Callable[[str], Path]) -> tuple[Path, list[dict[str, Any]]]:
    directory = two_processes(JOB)
    return directory, [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one_rank"), 6)[1]


def test_two_ranks_with_half_the_batch_train_like_one(two_ranks, one_rank):
    _, (first, second) = two_ranks
    for name, expected in one_rank["lora"].items():
        assert torch.equal(first["lora"][name], second["lora"][name])
        torch.testing.assert_close(first["lora"][name], expected, atol=1e-4, rtol=1e-3)
    assert first["reward"] == second["reward"] == pytest.approx(one_rank["reward"], abs=1e-5)
    assert first["loss"] == pytest.approx(one_rank["loss"], abs=1e-4)
    assert first["eval_reward"] == second["eval_reward"] == pytest.approx(one_rank["eval_reward"], abs=1e-5)
    assert first["ratio"][0] == one_rank["ratio"][0] == 1


def test_ranks_hold_their_own_rows_noise_and_advantages(two_ranks, one_rank):
    _, (first, second) = two_ranks
    assert first["rows"] == [0, 1, 2, 6, 7, 8]
    assert second["rows"] == [3, 4, 5, 9, 10, 11]
    assert first["window"] == second["window"] == one_rank["window"]
    for rank in (first, second):
        assert torch.equal(rank["initial"], one_rank["initial"][rank["rows"]])
        torch.testing.assert_close(rank["final"], one_rank["final"][rank["rows"]], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(rank["advantages"], one_rank["advantages"][rank["rows"]], atol=1e-3, rtol=1e-3)
    assert not any(torch.equal(a, b) for a in first["initial"] for b in second["initial"])


def test_ranks_exchange_as_many_bytes_as_are_planned(two_ranks, one_rank):
    _, (first, second) = two_ranks
    trained = sum(tensor.numel() for tensor in first["lora"].values())
    planned = traffic_of(
        ranks=2,
        sharded=False,
        trained=trained,
        optimizer_steps=2,
        denoiser_bytes=0,
        passes=0,
        backward_passes=0,
        samples=12,
        reward_functions=1,
        server_bytes=0,
    )
    # Two generations; a ring of two ranks sends each gradient once.
    assert first["gradient_bytes"] == second["gradient_bytes"] == 2 * planned.gradients == 2 * 2 * 4 * trained
    assert one_rank["gradient_bytes"] == 0


def test_integers_survive_the_gather(two_ranks):
    _, (first, _) = two_ranks
    assert first["gathered"].tolist() == [2**53 + 1, 2**24 + 1, 2**53 + 2, 2**24 + 1]


def test_the_main_process_alone_writes_one_checkpoint_and_history(two_ranks):
    directory, (first, _) = two_ranks
    assert (directory / "checkpoint-4").is_dir()
    assert [record.step for record in read_history(directory / HISTORY_NAME)] == [4]
    trainer = tiny_trainer(directory / "loaded")
    trainer.policy.load_lora(str(directory / "checkpoint-4"))
    loaded = lora_tensors(trainer)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in first["lora"].items())
