from __future__ import annotations

import math

import pytest
import torch

from dina_reward.evaluation import TieConvention, pairwise_accuracy
from dina_reward.evaluation.accuracy import Accuracy, pair_credit


# two right, one wrong, a predicted tie, a tied label, both tied
MARGINS = torch.tensor([1.0, -2.0, -0.5, 0.0, 3.0, 0.0])
LABELS = torch.tensor([1.0, 0.2, 0.9, 1.0, 0.5, 0.5])


@pytest.mark.parametrize(
    ("convention", "correct", "counted"),
    [
        ("half", 2.5, 4),
        ("imagereward", 2, 4),
        ("hpdv2", 5, 6),
        ("pickscore", 2 + 0.5 + 0.5 + 1, 6),
        ("dina_lrm", 2, 6),
    ],
)
def test_tie_conventions(convention: str, correct: float, counted: int) -> None:
    result = pairwise_accuracy(MARGINS, LABELS, ties=convention)
    assert result.value == pytest.approx(correct / counted)
    assert (result.counted, result.pairs, result.target_ties, result.predicted_ties) == (counted, 6, 2, 2)
    assert result.convention == convention


def test_labels_default_to_the_chosen_side() -> None:
    assert pairwise_accuracy(torch.tensor([1.0, 1.0, -1.0, 1.0])).value == 0.75


def test_threshold_makes_small_margins_ties() -> None:
    result = pairwise_accuracy(torch.tensor([0.05, 1.0]), ties="pickscore", tie_threshold=0.1)
    assert result.value == 0.75
    assert result.predicted_ties == 1


def test_without_a_threshold_only_equal_scores_are_ties() -> None:
    margins, labels = torch.tensor([0.01, -0.01, 0.0]), torch.ones(3)
    assert pair_credit(margins, labels).tolist() == [1.0, 0.0, 0.5]
    result = pairwise_accuracy(margins, labels)
    assert (result.value, result.predicted_ties, result.tie_threshold) == (0.5, 1, 0.0)
    assert Accuracy(0.5, 3, 3, 0, 0, "half").tie_threshold == 0.0


def test_own_convention() -> None:
    strict = TieConvention("strict", target_tie=0.0, predicted_tie=0.0, both=1.0)
    assert pairwise_accuracy(MARGINS, LABELS, ties=strict).value == pytest.approx(3 / 6)


def test_nothing_counts_when_every_label_is_a_tie() -> None:
    result = pairwise_accuracy(torch.ones(2), torch.full((2,), 0.5))
    assert math.isnan(result.value)
    assert result.counted == 0
    assert math.isnan(result.standard_error)


def test_standard_error() -> None:
    result = pairwise_accuracy(torch.tensor([1.0] * 75 + [-1.0] * 25))
    assert result.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 100))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown tie convention 'strict'; choose one of half"):
        pairwise_accuracy(MARGINS, ties="strict")
    with pytest.raises(ValueError, match=r"must both be \(pairs,\)"):
        pairwise_accuracy(MARGINS, LABELS[:2])
    with pytest.raises(ValueError, match="NaN"):
        pairwise_accuracy(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="tie_threshold"):
        pairwise_accuracy(MARGINS, tie_threshold=-1)
