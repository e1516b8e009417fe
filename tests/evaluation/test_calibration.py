from __future__ import annotations

import math

import pytest
import torch

from dina_reward.evaluation import measure_calibration


def test_numbers_by_hand() -> None:
    probabilities = torch.tensor([0.9, 0.1, 0.6, 0.55])
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0])
    result = measure_calibration(probabilities, labels, num_bins=2)
    low, high = result.bins
    assert (low.count, high.count) == (2, 2)
    assert low.confidence == pytest.approx(0.575)
    assert low.frequency == pytest.approx(0.5)
    assert (high.confidence, high.frequency) == pytest.approx((0.9, 1.0))
    assert result.expected_calibration_error == pytest.approx(0.5 * 0.075 + 0.5 * 0.1)
    assert result.nll == pytest.approx(-(2 * math.log(0.9) + math.log(0.4) + math.log(0.55)) / 4)
    assert result.brier == pytest.approx((0.01 + 0.01 + 0.36 + 0.2025) / 4)


def test_sides_are_exchangeable() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 200, generator=generator)
    one, other = measure_calibration(p, q), measure_calibration(1 - p, 1 - q)
    assert one.expected_calibration_error == pytest.approx(other.expected_calibration_error, abs=1e-6)
    assert one.nll == pytest.approx(other.nll, abs=1e-6)


def test_calibrated_predictions_have_a_small_error_and_overconfident_ones_a_large_one() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, generator=generator)
    outcome = torch.bernoulli(p, generator=generator)
    assert measure_calibration(p, outcome).expected_calibration_error < 0.02
    sharpened = torch.sigmoid(4 * torch.logit(p.clamp(1e-6, 1 - 1e-6)))
    assert measure_calibration(sharpened, outcome).expected_calibration_error > 0.1


def test_certainty_and_empty_bins() -> None:
    result = measure_calibration(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert result.bins[-1].count == 2
    assert result.bins[0].count == 0
    assert math.isnan(result.bins[0].confidence)
    assert result.expected_calibration_error == 0
    assert math.isfinite(measure_calibration(torch.tensor([0.0]), torch.tensor([1.0])).nll)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        measure_calibration(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"must both be \(pairs,\)"):
        measure_calibration(torch.rand(3), torch.ones(2))
    with pytest.raises(ValueError, match=r"probabilities must lie in \[0, 1\]"):
        measure_calibration(torch.tensor([1.5]), torch.ones(1))
    with pytest.raises(ValueError, match="num_bins"):
        measure_calibration(torch.ones(1), torch.ones(1), num_bins=0)


def test_an_even_prediction_is_read_as_the_chosen_side() -> None:
    halves = measure_calibration(torch.tensor([0.5]), torch.tensor([1.0]), num_bins=2).bins
    assert [(bin_.low, bin_.high) for bin_ in halves] == [(0.5, 0.75), (0.75, 1.0)]
    result = measure_calibration(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.8]), num_bins=1)
    assert result.bins[0].frequency == pytest.approx(0.9)
    assert result.expected_calibration_error == pytest.approx(0.4)


def test_there_are_ten_bins_unless_asked() -> None:
    bins = measure_calibration(torch.tensor([0.61, 0.72]), torch.ones(2)).bins
    assert [(row.low, row.count) for row in bins if row.count] == [(pytest.approx(0.6), 1), (pytest.approx(0.7), 1)]
    assert len(bins) == 10


def test_certainty_costs_what_is_left_after_clipping() -> None:
    wrong = measure_calibration(torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.0]))
    assert wrong.nll == pytest.approx(-math.log(1e-7), rel=1e-6)
