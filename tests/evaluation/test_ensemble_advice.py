"""Advice on margins whose signal and noise are known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward.evaluation import DrawMargins, advise, ensemble_advice
from dina_reward.likelihood import BradleyTerryModel
from dina_reward.reward import LatentReward
from tests.training.tiny_reward import separable_pairs, tiny_reward


LEVELS = (0.2, 0.5, 0.8)


def world(noise: float, *, pairs: int = 4000, draws: int = 4, shared: bool = False) -> DrawMargins:
    """Margins of standard normal truth; noise by draw, which levels share or not; labels are the truth's sign."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(pairs, 1, 1, generator=generator)
    errors = torch.randn(pairs, 1 if shared else 3, draws, generator=generator).expand(-1, 3, -1)
    return DrawMargins(
        LEVELS,
        truth + noise * errors,
        {},
        (truth > 0).double().flatten(),
        [pair % 100 for pair in range(pairs)],
        BradleyTerryModel(),
    )


def of(advice: Any, name: str) -> Any:
    return next(each for each in advice.ensembles if each.name == name)


def test_noise_that_averages_out_pays_and_is_predicted() -> None:
    advice = advise(world(1.0), [LEVELS], resamples=200)
    assert [part.noise_share for part in advice.variances] == pytest.approx([0.5] * 3, abs=0.02)
    # Correlation with the truth 1 / sqrt(1 + 1 / K): 75 % for one draw, 1/2 + arcsin(sqrt(.8)) / pi for four.
    assert advice.accuracy[0.5] == pytest.approx(0.75, abs=0.015)
    gain = 0.5 + math.asin(0.8**0.5) / math.pi - 0.75
    four = of(advice, f"4 draws at {advice.best_level:g}")
    assert four.accuracy.measured == pytest.approx(gain, abs=0.015)
    assert four.accuracy.predicted == pytest.approx(gain, abs=0.01)
    assert four.nll.measured == pytest.approx(four.nll.predicted, abs=0.02)
    assert four.nll.measured > 0.05
    assert four.passes == 4
    assert advice.recommended == four
    assert advice.recommendation.startswith(f"4 draws at {advice.best_level:g}: +10.")
    assert advice.recommendation.endswith("for 4 passes instead of one")
    # Three levels with noise of their own are three draws.
    own = of(advice, "levels (0.2, 0.5, 0.8), mean, own noise")
    gain = 0.5 + math.asin(0.75**0.5) / math.pi - 0.75
    assert own.accuracy.measured == pytest.approx(gain, abs=0.015)
    assert own.accuracy.predicted == pytest.approx(gain, abs=0.01)


def test_levels_that_share_their_noise_average_nothing_away() -> None:
    advice = advise(world(1.0, shared=True), [LEVELS], resamples=200)
    shared, own = (of(advice, f"levels (0.2, 0.5, 0.8), mean, {what} noise") for what in ("shared", "own"))
    assert (shared.accuracy.measured, *shared.accuracy.interval) == pytest.approx((0, 0, 0), abs=1e-3)
    assert shared.accuracy.predicted == pytest.approx(0, abs=1e-6)
    assert not shared.accuracy.pays
    assert own.accuracy.measured > 0.06
    assert own.accuracy.predicted == pytest.approx(own.accuracy.measured, abs=0.015)


def test_without_noise_no_ensemble_pays() -> None:
    advice = advise(world(0.0, pairs=300), [LEVELS], resamples=100)
    assert [part.noise for part in advice.variances] == [0.0] * 3
    assert (advice.recommended, advice.recommended_for_probabilities) == (None, None)
    assert advice.recommendation == "no ensemble pays: single level 0.2"
    assert "| 0.2         |" in advice.table()
    assert "Recommendation: no ensemble pays: single level 0.2." in advice.table()


def test_a_gain_that_is_not_resolved_is_not_recommended() -> None:
    # Three points are to be gained, and a pair is worth two.
    advice = advise(world(0.2, pairs=50), [LEVELS], resamples=200)
    assert max(each.accuracy.measured for each in advice.ensembles) > 0
    assert advice.recommended is None
    assert advice.recommendation.startswith("no ensemble pays")


def test_gain_in_probabilities_alone_is_said_apart() -> None:
    # Every sign is right under every draw, so averages cannot be more accurate; labels are soft.
    generator = torch.Generator().manual_seed(0)
    size = 4 + torch.rand(500, 1, 1, generator=generator)
    margins = size + 1.5 * (torch.rand(500, 3, 4, generator=generator) - 0.5)
    labels = torch.sigmoid(size).double().flatten()
    advice = advise(DrawMargins(LEVELS, margins, {}, labels, range(500), BradleyTerryModel()), resamples=200)
    assert advice.recommended is None
    found = advice.recommended_for_probabilities
    assert found is not None
    assert found.name == f"4 draws at {advice.best_nll_level:g}"
    assert advice.recommendation.startswith("no ensemble pays in accuracy: single level")
    assert f"{found.name}: NLL better by +0.0" in advice.recommendation


def test_the_best_level_is_what_gains_are_relative_to() -> None:
    made = world(0.5)
    worse = made.margins.clone()
    worse[:, 1:] = -worse[:, 1:]
    advice = advise(replace(made, margins=worse), [LEVELS], resamples=100)
    assert (advice.best_level, advice.best_nll_level) == (0.2, 0.2)
    lost = of(advice, "levels (0.2, 0.5, 0.8), mean, own noise")
    assert lost.accuracy.costs
    assert lost.accuracy.measured < -0.3
    assert [each.name for each in advice.ensembles[:2]] == ["2 draws at 0.2", "4 draws at 0.2"]


def test_end_to_end(sd3_pipeline: Any) -> None:
    reward: LatentReward = tiny_reward(pipeline=sd3_pipeline).eval()

    def advice(batch_size: int) -> Any:
        return ensemble_advice(
            reward, separable_pairs(8), noise_levels=(0.2, 0.5), ensembles=[(0.2, 0.7)], draws=3, resamples=50,
            batch_size=batch_size, progress=False,
        )  # fmt: skip

    first = advice(8)
    assert list(first.accuracy) == [0.2, 0.5, 0.7]
    names = [each.name for each in first.ensembles]
    best = f"{first.best_level:g}"
    assert names[:2] == [f"2 draws at {best}", f"3 draws at {best}"]
    assert names[-4:] == [
        f"levels (0.2, 0.7), {kind}, {what} noise" for what in ("shared", "own") for kind in ("mean", "tokens")
    ]
    assert first.ensembles[-1].accuracy.predicted is None
    data = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert data["recommendation"] == first.recommendation
    assert [each.noise for each in advice(3).variances] == pytest.approx(
        [each.noise for each in first.variances], rel=1e-3
    )


def test_labels_that_are_ties_do_not_count() -> None:
    made = world(1.0, pairs=400)
    labels: Tensor = made.labels.clone()
    labels[:100] = 0.5
    advice = advise(replace(made, labels=labels), resamples=50)
    rest = advise(
        replace(made, margins=made.margins[100:], labels=made.labels[100:], clusters=made.clusters[100:]), resamples=50
    )
    assert advice.accuracy == pytest.approx(rest.accuracy)
