"""Runs of every alignment trainer end by SIGKILL between and during saves, or by SIGTERM, and lose nothing."""

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
    """Of the cases that are tested, all in one process."""
    items: list[Any] = [item for item in request.session.items if item.module is request.module]  # type: ignore[attr-defined]
    cases = [f"{item.callspec.params['name']} {item.callspec.params['moment']}" for item in items]
    directory = tmp_path_factory.mktemp("killed")
    worker = Path(__file__).with_name("kill_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(worker), str(directory), *cases], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((directory / "report.json").read_text())


@pytest.mark.parametrize("moment", ["between", "during", pytest.param("terminated", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS]
)
def test_a_killed_run_resumes_bit_for_bit(report: dict[str, Any], name: str, moment: str) -> None:
    case = report[f"{name} {moment}"]
    assert case["code"] == (128 + signal.SIGTERM if moment == "terminated" else -signal.SIGKILL)
    left = [directory for directory in case["left"] if directory.startswith("checkpoint")]
    if moment == "terminated":  # saved at the next step that it can be resumed from
        assert left[:2] == ["checkpoint-2", "checkpoint-4"]
        assert len(left) == 3
    else:
        assert left == (["checkpoint-2", "checkpoint-4"] if moment == "between" else ["checkpoint-2"])
    assert case["steps"] == 6
    assert case["tensors"] > 0
    assert case["different"] == []
