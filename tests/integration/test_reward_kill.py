"""Reward training is killed between and during saves and by SIGTERM, and loses nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest


KILLS = "reward"


@pytest.fixture(scope="module")
def report(killed: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return killed(KILLS)


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
