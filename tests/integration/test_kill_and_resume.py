"""Runs of every alignment trainer end by SIGKILL between and during saves, or by SIGTERM, and lose nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.alignment.helpers import ALGORITHMS


KILLS = "alignment"
BY_DEFAULT = ("nft",)  # the one with most in its checkpoints: an older policy beside the trained one


def arguments_of(items: list[Any]) -> list[list[list[str]]]:
    """Of the cases that are tested."""
    return [[[item.callspec.params["name"], item.callspec.params["moment"]] for item in items]]


@pytest.fixture(scope="module")
def report(killed: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return killed(KILLS)


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
