from __future__ import annotations

from typing import Any

import pytest

from dina_reward.evaluation import benchmark_rows, benchmark_table


def comparison(values: dict[tuple[str, str], float | None], ties: str = "half") -> dict[str, Any]:
    """What an evaluation of these accuracies writes, as far as the table reads it."""
    rewards: dict[str, dict[str, Any]] = {}
    for (reward, setting), value in values.items():
        interval = None if value is None else [value - 0.05, value + 0.05]
        rewards.setdefault(reward, {})[setting] = {"accuracy": {"value": value, "interval": interval}}
    return {
        "dataset": "d (test)",
        "pairs": 1234,
        "prompts": 56,
        "ties": {"name": ties},
        "rewards": [{"name": name, "settings": settings} for name, settings in rewards.items()],
    }


FIRST = {("lrm", "0.4"): 0.8, ("lrm", "0.2+0.5 tokens"): 0.82, ("pickscore", "score"): 0.7}
SECOND = {("pickscore", "score"): 0.6, ("lrm", "0.2+0.5 tokens"): 0.72, ("lrm", "0.4"): 0.7}


def test_rows_keep_their_order_and_average_benchmarks_alike() -> None:
    rows = benchmark_rows({"HPDv2": comparison(FIRST), "HPDv3": comparison(SECOND)})
    assert [(row.reward, row.setting) for row in rows] == list(FIRST)
    assert rows[0].accuracy == pytest.approx({"HPDv2": 0.8, "HPDv3": 0.7})
    assert rows[0].interval["HPDv3"] == pytest.approx((0.65, 0.75))
    assert [row.average for row in rows] == pytest.approx([0.75, 0.77, 0.65])


def test_table_names_benchmarks_and_their_conventions() -> None:
    table = benchmark_table({"HPDv2": comparison(FIRST, "hpdv2"), "HPDv3": comparison(SECOND)})
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert "| lrm | 0.4 | 80.00 [75.00, 85.00] | 70.00 [65.00, 75.00] | 75.00 |" in rows
    assert "- HPDv2: 1,234 pairs, 56 prompts, tie convention 'hpdv2' (d (test))" in table


def test_what_has_no_accuracy_has_no_average() -> None:
    (row,) = benchmark_rows({"a": comparison({("r", "s"): None}), "b": comparison({("r", "s"): 0.5})})
    assert row.accuracy == {"a": None, "b": 0.5}
    assert row.average is None
    table = benchmark_table({"a": comparison({("r", "s"): None}), "b": comparison({("r", "s"): 0.5})})
    assert "| r | s | - | 50.00 [45.00, 55.00] | - |" in [" ".join(line.split()) for line in table.splitlines()]
    assert row.interval == {"a": None, "b": pytest.approx((0.45, 0.55))}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no benchmark"):
        benchmark_rows({})
    other = {**SECOND, ("lrm", "0.9"): 0.5}
    with pytest.raises(ValueError, match="b was evaluated with other rewards or settings than the rest: lrm at 0.9"):
        benchmark_rows({"a": comparison(FIRST), "b": comparison(other)})
