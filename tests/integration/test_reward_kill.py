"""Reward training is killed between and during saves and by SIGTERM, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("killed")
    worker = Path(__file__).with_name("reward_kill_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(worker), str(directory)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((directory / "report.json").read_text())


@pytest.mark.parametrize(
    ("moment", "code", "left"),
    [
        ("between", -signal.SIGKILL, ["checkpoint-2", "checkpoint-4"]),
        ("during", -signal.SIGKILL, ["checkpoint-2"]),
        ("terminated", 143, ["checkpoint-2", "checkpoint-4", "checkpoint-5"]),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(report: dict[str, Any], moment: str, code: int, left: list[str]) -> None:
    case = report[moment]
    assert case["code"] == code
    assert [name for name in case["left"] if name.startswith("checkpoint")] == left
    assert case["steps"] == 8
    assert case["different"] == []
