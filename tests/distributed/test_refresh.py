"""A run that refreshes its reward, on two gloo processes with half the batch against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch_two_processes
from tests.distributed.refresh_worker import run


pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_ranks_refresh_like_one(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    launch_two_processes(Path(__file__).with_name("refresh_worker.py"), tmp_path / "two", 3)
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    alone = run(tmp_path / "one", 6)
    assert first["processes"] == second["processes"] == 2
    assert (first["asked"], second["asked"]) == (alone["asked"], 0)  # the main process asks
    for name in ("accuracies", "pairs", "denoiser_calls", "judge_calls"):
        assert first[name] == second[name] == alone[name]
    for kind in ("reward", "lora"):
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in alone[kind])
        apart = torch.cat([(first[kind][name] - tensor).flatten().abs() for name, tensor in alone[kind].items()])
        # Where a gradient is all rounding, AdamW steps by its sign.
        assert float((apart > 1e-4).float().mean()) < 0.01
    assert first["pairs"]
