"""Parts of a dataset, with numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dina_reward.evaluation.cells import FEW_PAIRS, MAX_CELLS, NO_VALUE, REST, Cell, CellAnalysis, worst_cell


def measure(values: list[object], margins: list[float], labels: list[float], **options: object) -> dict[str, Cell]:
    analysis = CellAnalysis({"kind": values}, range(len(values)), resamples=50)
    return analysis.measure(torch.tensor(margins), torch.tensor(labels), **options)[1]["kind"]  # type: ignore[arg-type]


def test_accuracy_margin_and_calibration_by_hand() -> None:
    # x: right by 2, and wrong by 1 about a pair whose second side is preferred; y: a tied label, and right by 3.
    cells = measure(
        ["x", "x", "y", "y"],
        [2.0, 1.0, 5.0, 3.0],
        [1.0, 0.2, 0.5, 1.0],
        probabilities=torch.tensor([0.9, 0.7, 0.6, 0.8]),
    )
    assert (cells["x"].accuracy.value, cells["x"].accuracy.counted) == (0.5, 2)
    assert cells["x"].mean_margin == pytest.approx((2 - 1) / 2)
    # Two bins of one pair each: |0.9 - 1| and |0.7 - 0.2|.
    assert cells["x"].calibration_error == pytest.approx((0.1 + 0.5) / 2)
    assert (cells["y"].accuracy.value, cells["y"].accuracy.counted, cells["y"].accuracy.pairs) == (1.0, 1, 2)
    assert cells["y"].mean_margin == pytest.approx(3)
    assert cells["y"].calibration_error == pytest.approx((0.1 + 0.2) / 2)


def test_total_and_intervals_resample_prompts() -> None:
    # Two prompts: one all right, one all wrong. A resample has either of them or both, in any cell.
    analysis = CellAnalysis({"kind": ["x", "y", "x", "y"]}, ["p", "p", "q", "q"], resamples=200)
    total, cells, drawn = analysis.measure(torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.ones(4))
    assert (total.value, total.interval) == (0.5, (0.0, 1.0))
    assert cells["kind"]["x"].accuracy.interval == (0.0, 1.0)
    assert cells["kind"]["x"].calibration_error is None
    assert set(drawn.tolist()) == {0.0, 0.5, 1.0}


def test_few_pairs_are_marked_and_are_not_the_worst() -> None:
    right, wrong, counts = "right", "wrong", (FEW_PAIRS, FEW_PAIRS - 1)
    values: list[object] = [right] * counts[0] + [wrong] * counts[1]
    cells = measure(values, [1.0] * counts[0] + [-1.0] * counts[1], [1.0] * sum(counts))
    assert (cells[right].few, cells[wrong].few) == (False, True)
    assert worst_cell(cells) == (right, cells[right])
    assert worst_cell({wrong: cells[wrong], "other": cells[wrong]}) is None
    assert worst_cell({right: cells[right]}) is None


def test_a_cell_without_a_pair_that_counts() -> None:
    cell = measure(["x", "y"], [1.0, 1.0], [0.5, 1.0])["x"]
    assert (cell.accuracy.counted, cell.few) == (0, True)
    assert math.isnan(cell.accuracy.value)
    assert math.isnan(cell.mean_margin)


def test_many_values_are_pooled_and_missing_ones_have_a_cell_of_their_own() -> None:
    values: list[object] = [f"value {number}" for number in range(MAX_CELLS + 3)] + ["value 7", None, ""]
    cells = measure(values, [1.0] * len(values), [1.0] * len(values))
    assert len(cells) == MAX_CELLS + 2
    assert next(iter(cells)) == "value 7"
    assert (cells[REST].accuracy.pairs, cells[NO_VALUE].accuracy.pairs) == (3, 2)
    assert measure([None, ""], [1.0, 1.0], [1.0, 1.0]) == {}


def test_numbers_are_classes_where_they_are_many() -> None:
    few = measure([1, 2.5, True, float("nan")], [1.0] * 4, [1.0] * 4)
    assert set(few) == {"1", "2.5", "True", NO_VALUE}
    many = measure([*range(100), None], [1.0] * 101, [1.0] * 101)
    assert {name: cell.accuracy.pairs for name, cell in many.items()} == {
        "0 to 24.8": 25,
        "24.8 to 49.5": 25,
        "49.5 to 74.2": 25,
        "74.2 to 99": 25,
        NO_VALUE: 1,
    }


def test_a_column_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"each of the 2 pairs, got lengths \{'kind': 3\}"):
        CellAnalysis({"kind": ["x", "y", "z"]}, ["p", "q"])
