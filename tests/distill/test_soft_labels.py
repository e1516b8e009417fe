from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from dina_reward.distill.soft_labels import JudgeScale, fit_scale, fit_temperature


def test_probability_of_a_gap():
    scale = JudgeScale(mean=1, std=2, temperature=0.5)
    assert scale.probability(0.5) == pytest.approx(0.8413, abs=1e-4)
    assert scale.probability(-0.5) == pytest.approx(0.1587, abs=1e-4)
    assert scale.probability(0.0) == 0.5
    assert scale.probability(0.3, tie_margin=0.3) == 0.5
    assert scale.standardized(5) == 2
    assert JudgeScale(std=1).probability(0.1) == 1.0


def test_temperature_of_a_noisy_judge_is_that_of_its_noise():
    generator = torch.Generator().manual_seed(0)
    truth = 2 * torch.randn(4000, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 4000, generator=generator, dtype=torch.float64)
    first, second = (truth + 0.5 * noise).tolist()
    # Of the second gap given the first: slope 4 / 4.25, and what is left of truth and noise.
    slope = 4 / 4.25
    expected = math.sqrt(4 * (1 - slope) + 0.25) / slope
    assert fit_temperature(first, second, std=2.0) == pytest.approx(expected, rel=0.1)


def test_a_judge_that_repeats_itself_is_sure_of_large_gaps_alone():
    answers = dict(enumerate([0.0, 1.0, 3.0, 3.0]))
    scale = fit_scale("scores", answers, answers, [[0, 1, 2, 3]])
    assert scale.agreement == 1
    # Unequal gaps of the group: 1, 3, 3, 2, 2; half of their median is the temperature.
    assert scale.temperature == 1.0
    assert scale.probability(1.0) == pytest.approx(0.8413, abs=1e-4)
    assert scale.probability(3.0) > 0.998
    assert fit_scale("scores", answers, {}, [[0, 1, 2, 3]]).temperature == 1.0
    assert scale.probability(0.0) == 0.5
    given = fit_scale("scores", answers, {}, [[0, 1, 2, 3]], temperature=2.0)
    assert (given.temperature, given.repeats) == (2.0, 0)
    assert math.isnan(given.agreement)


def test_only_pairs_of_one_prompt_are_compared():
    answers = {0: 0.0, 1: 1.0, 2: 100.0, 3: 101.0}
    repeated = {0: 1.0, 1: 0.0, 2: 101.0, 3: 100.0}
    scale = fit_scale("scores", answers, repeated, [[0, 1], [2, 3]])
    assert scale.agreement == 0
    assert scale.temperature == pytest.approx(10 * scale.std)


def test_slips_of_a_judge_of_pairs():
    answers = {(i, i + 1): float(i % 2) for i in range(100)}
    repeated = {pair: (1 - p if pair[0] < 32 else p) for pair, p in answers.items()}
    scale = fit_scale("pairs", answers, repeated, [])
    assert scale.agreement == pytest.approx(0.68)
    assert 2 * scale.slips * (1 - scale.slips) == pytest.approx(0.32)
    assert scale.softened(1.0) == pytest.approx(1 - scale.slips)
    assert scale.softened(0.5) == 0.5
    turned = fit_scale("pairs", answers, {pair: 1 - p for pair, p in answers.items()}, [])
    assert turned.slips == 0.5


def test_a_scale_survives_json():
    scale = JudgeScale(1, 2, 3, 0.1, 4, 0.9)
    assert JudgeScale.from_json(asdict(scale)) == scale
    assert math.isnan(JudgeScale.from_json({"agreement": None}).agreement)
