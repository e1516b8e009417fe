from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dina_reward.data.schemas import SCHEMAS
from dina_reward.evaluation import BENCHMARK_TIES, TIE_CONVENTIONS, pairwise_accuracy, tune_tie_threshold
from dina_reward.evaluation.ties import TieThreshold, validation_half


def test_every_schema_has_a_convention() -> None:
    assert set(BENCHMARK_TIES) == set(SCHEMAS)
    assert set(BENCHMARK_TIES.values()) <= set(TIE_CONVENTIONS)


def test_hpdv2_is_one_minus_the_share_of_inversions_averaged_over_rankings() -> None:
    # Ranking x: scores 3 2 1 0, ranks 1 2 4 3: one inversion of six pairs. Ranking y: scores 0 1, ranks 1 2: inverted.
    margins = torch.tensor([1.0, 2, 3, 1, 2, 1, -1])
    labels = torch.tensor([1.0, 1, 1, 1, 1, 0, 1])
    result = pairwise_accuracy(margins, labels, ties="hpdv2", rankings=["x"] * 6 + ["y"])
    assert result.value == pytest.approx((5 / 6 + 0) / 2)
    assert result.rankings == 2
    assert pairwise_accuracy(margins, labels, ties="hpdv2").value == pytest.approx(5 / 7)
    # Ties on either side count as correct: the inverted pair of x becomes a tied label, that of y a tied prediction.
    labels[5], margins[6] = 0.5, 0.0
    assert pairwise_accuracy(margins, labels, ties="hpdv2", rankings=["x"] * 6 + ["y"]).value == 1.0


def test_rankings_matter_to_hpdv2_alone() -> None:
    margins, labels = torch.tensor([1.0, 1, -1]), torch.ones(3)
    for name in set(TIE_CONVENTIONS) - {"hpdv2"}:
        result = pairwise_accuracy(margins, labels, ties=name, rankings=["x", "x", "y"])
        assert result.value == pytest.approx(2 / 3)
        assert result.rankings is None
    with pytest.raises(ValueError, match="got 2 rankings for 3 pairs"):
        pairwise_accuracy(margins, labels, ties="hpdv2", rankings=["x", "y"])


def test_threshold_by_hand() -> None:
    # Sizes .1 (tied label), .2 (wrong), .3 (right), .4 (tied label), 1 (right). Credit without threshold: .5 0 1 .5 1.
    # Up to .2: 1 .5 1 .5 1 = 4.0; up to .3: 3.5; up to .4: 1 .5 .5 1 1 = 4.0 too: the smaller threshold wins.
    margins = torch.tensor([0.1, -0.2, 0.3, -0.4, 1.0])
    labels = torch.tensor([0.5, 1.0, 1.0, 0.5, 1.0])
    threshold = tune_tie_threshold(margins, labels)
    assert threshold == pytest.approx(0.2)
    assert pairwise_accuracy(margins, labels, ties="pickscore", tie_threshold=threshold).value == pytest.approx(0.8)


def test_without_ties_and_errors_the_threshold_is_zero() -> None:
    assert tune_tie_threshold(torch.tensor([0.5, -1.0]), torch.tensor([1.0, 0.0])) == 0


@given(st.lists(st.tuples(st.integers(-4, 4), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=12))
def test_no_other_threshold_is_better(rows: list[tuple[int, float]]) -> None:
    margins, labels = (torch.tensor([float(row[i]) for row in rows]) for i in (0, 1))
    best = tune_tie_threshold(margins, labels)
    values = {t: pairwise_accuracy(margins, labels, ties="pickscore", tie_threshold=t).value for t in (0, 1, 2, 3, 4)}
    assert values[int(best)] == pytest.approx(max(values.values()))
    assert all(values[t] < max(values.values()) - 1e-12 for t in range(int(best)))


def test_half_of_the_prompts_is_held_out_and_prompts_stay_whole() -> None:
    clusters = [f"prompt {number // 3}" for number in range(30)]
    held = validation_half(clusters, seed=0)
    assert held.sum() == 15
    assert all(len(set(held[number : number + 3])) == 1 for number in range(0, 30, 3))
    assert np.array_equal(held, validation_half(clusters, seed=0))
    assert not np.array_equal(held, validation_half(clusters, seed=1))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no pairs to tune"):
        tune_tie_threshold(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="only one; give tie_threshold"):
        validation_half(["x", "x"], 0)
    assert "as given" in TieThreshold(0.5, "given").describe()


def test_a_threshold_without_words_is_that_of_equal_scores() -> None:
    assert TieThreshold() == TieThreshold(0.0, "exact ties", 0)
    assert TieThreshold(0.5, "tuned").describe() == "predicted tie: |margin| <= 0.5, tuned on 0 other pairs"
