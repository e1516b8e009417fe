from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dina_reward.evaluation.distribution import describe_scores


def test_numbers_agree_with_numpy() -> None:
    scores = torch.randn(501, generator=torch.Generator().manual_seed(0)) * 3 - 10
    result = describe_scores(scores)
    values = scores.double().numpy()
    assert (result.mean, result.std) == pytest.approx((values.mean(), values.std(ddof=1)))
    for probability, value in result.quantiles.items():
        assert value == pytest.approx(np.quantile(values, float(probability)))
    assert (result.minimum, result.maximum) == pytest.approx((values.min(), values.max()))
    assert (sum(result.histogram), len(result.histogram)) == (501, 40)
    normalised = (values + result.suggested_shift) / result.suggested_scale
    assert (normalised.mean(), normalised.std(ddof=1)) == pytest.approx((0, 1), abs=1e-9)


def test_equal_scores_suggest_nothing() -> None:
    for scores in (torch.ones(4), torch.ones(1)):
        result = describe_scores(scores)
        assert math.isnan(result.suggested_shift)
        assert result.quantiles["0.5"] == 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(samples,\)"):
        describe_scores(torch.zeros(0))
