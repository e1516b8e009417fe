"""Runs of every alignment trainer are killed by SIGKILL between and during saves, and lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.helpers import ALGORITHMS


ROOT = Path(__file__).parents[2]
BY_DEFAULT = ("nft",)  # the one with most in its checkpoints: an older policy beside the trained one


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the algorithms that are tested, all in one process."""
    items: list[Any] = [item for item in request.session.items if item.module is request.module]  # type: ignore[attr-defined]
    names = dict.fromkeys(item.callspec.params["name"] for item in items)
    directory = tmp_path_factory.mktemp("killed")
    worker = Path(__file__).with_name("kill_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(worker), str(directory), *names], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((directory / "report.json").read_text())


@pytest.mark.parametrize("moment", ["between", "during"])
@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
)
def test_a_killed_run_resumes_bit_for_bit(report: dict[str, Any], name: str, moment: str) -> None:
    case = report[f"{name} {moment}"]
    assert case["killed_by"] == signal.SIGKILL
    whole = ["checkpoint-2", "checkpoint-4"] if moment == "between" else ["checkpoint-2"]
    assert [directory for directory in case["left"] if directory.startswith("checkpoint")] == whole
    assert case["steps"] == 6
    assert case["tensors"] > 0
    assert case["different"] == []
