"""Ratios, the iteration and the files of a report, from rows that are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dina_reward.bench import BenchReport, Machine, Row
from dina_reward.bench.rows import CALL, DECODE, GRADIENT, IMAGE_TOWER, SCORE


def row(what: str, seconds: float, batch: int = 4, mode: str = "", levels: int = 1, compiled: bool = False) -> Row:
    return Row(what, mode, compiled, batch, levels, seconds, 0.01, batch / seconds, 10**9, 0.5, 0.8, 2**30)


def report(*rows: Row) -> BenchReport:
    machine = Machine("A CPU, 2 threads", "cpu", 2, "float32", 1e11, 1e10, "2.6")
    return BenchReport("SD3.5-Medium", "random", 512, 512, machine, rows, {}, steps=10, train_steps=2)


ROWS = (
    row(SCORE, 0.1, batch=1, mode="standalone"),
    row(SCORE, 0.2, batch=2, mode="standalone"),
    row(SCORE, 0.4, mode="standalone"),
    row(SCORE, 1.0, mode="standalone", levels=3),
    row(SCORE, 0.3, mode="standalone", compiled=True),
    row(SCORE, 0.5, mode="shared"),
    row(DECODE, 0.8),
    row(IMAGE_TOWER, 0.4),
    row(CALL, 1.0),
    row(GRADIENT, 3.0),
)


def test_ratios_are_of_rows_at_the_same_batch() -> None:
    assert report(*ROWS).ratios == pytest.approx(
        {
            "three levels / one, standalone": 2.5,
            "compiled / eager, standalone": 0.75,
            "shared / standalone": 1.25,
            "decode and CLIP-H / score": 3.0,
        }
    )
    assert report().ratios == {}


def test_an_iteration_is_put_together_per_sample() -> None:
    part = report(*ROWS).iteration
    assert part is not None
    assert (part.rollout, part.reward, part.update) == pytest.approx((10 * 0.25, 0.125, 2 * 0.75))
    assert part.reward_share == pytest.approx(0.125 / (2.5 + 0.125 + 1.5))
    assert report(*ROWS[:-1]).iteration is None


def test_the_exponent_is_that_of_the_batch() -> None:
    assert report(*ROWS).exponent == pytest.approx(1.0)
    assert report(*ROWS[1:]).exponent is None


def test_a_report_is_a_table_a_json_file_and_a_picture(tmp_path: Path) -> None:
    found = report(*ROWS)
    data, picture = found.save(tmp_path / "new")
    assert data.name == "bench-sd3-5-medium-a-cpu--2-threads-float32.json"
    values = json.loads(data.read_text())
    assert values["iteration"]["reward_share"] == pytest.approx(found.iteration.reward_share)  # type: ignore[union-attr]
    assert values["machine"]["matrix_rate"] == 1e11
    assert len(values["rows"]) == len(ROWS)
    with Image.open(picture) as image:
        assert image.width > 800
    line = next(line for line in found.table().splitlines() if "K = 3" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        *("score, standalone, K = 3, batch 4", "1,000.0", "10.0", "4.0", "1.00", "1.0", "50.0", "80.0", "1.00"),
    ]


def test_a_call_that_was_made_once_has_no_spread() -> None:
    line = report(replace(ROWS[0], spread=None)).table().splitlines()[-1]
    assert line.split("|")[3].strip() == "?"
