"""The algorithms that run with the slow tests on two gloo processes with half the batch against one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.algorithms_worker import NAMES, run
from tests.distributed.test_algorithms import check_ranks


pytestmark = [pytest.mark.distributed, pytest.mark.slow]
JOB = "other_algorithms"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("one_rank"), 6, JOB)


@pytest.mark.parametrize("name", NAMES[JOB])
def test_two_ranks_with_half_the_batch_train_like_one(
    two_processes: Callable[[str], Path], alone: dict[str, Any], name: str
) -> None:
    directory = two_processes(JOB)
    ranks = [torch.load(directory / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    check_ranks(ranks[0][name], ranks[1][name], alone[name])
