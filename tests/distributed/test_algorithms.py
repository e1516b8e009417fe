"""Every algorithm on two gloo processes with half the batch against one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.algorithms_worker import NAMES, run


pytestmark = pytest.mark.distributed
JOB = "algorithms"


@pytest.fixture(scope="module")
def ranks(two_processes: Callable[[str], Path]) -> list[dict[str, Any]]:
    directory = two_processes(JOB)
    return [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one_rank"), 6, JOB)


@pytest.mark.parametrize("name", NAMES[JOB])
def test_two_ranks_with_half_the_batch_train_like_one(ranks: list[Any], alone: dict[str, Any], name: str) -> None:
    check_ranks(ranks[0][name], ranks[1][name], alone[name])


def check_ranks(first: dict[str, Any], second: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights, rewards, gradients and calls of both ranks are those of one process."""
    assert first["processes"] == second["processes"] == 2
    for kind in ("lora", "averaged"):
        for key, tensor in expected[kind].items():
            assert torch.equal(first[kind][key], second[kind][key])
            torch.testing.assert_close(first[kind][key], tensor, atol=2e-4, rtol=2e-3)
    assert first["reward"] == second["reward"] == pytest.approx(expected["reward"], rel=1e-4, abs=1e-5)
    assert first["grad_norm"][0] == pytest.approx(expected["grad_norm"][0], rel=1e-2)
    assert first["costs"] == second["costs"] == expected["costs"]
    start = {key: tensor for key, tensor in expected["lora"].items() if "lora_B" in key}
    assert any(float(tensor.abs().max()) > 1e-4 for tensor in start.values())
