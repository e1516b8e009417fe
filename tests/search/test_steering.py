"""Feynman-Kac steering is sequential Monte Carlo: weights, resampling, and the distribution it targets."""

from __future__ import annotations

import pytest
import torch

from dina_reward.alignment.sampling.rollout import sample
from dina_reward.alignment.sampling.seeding import Stream
from dina_reward.search import FKSteering
from dina_reward.search.method import stochastic_steps
from dina_reward.search.steering import normalised_weights, systematic_resampling
from tests.search.helpers import gaussian_run


def test_strength_zero_is_plain_sampling_bit_for_bit() -> None:
    run = gaussian_run(prompts=2, budget=3, keep=3)
    particles, scores = FKSteering(strength=0.0).run(run)
    rows = [(prompt, stream) for prompt in range(2) for stream in range(3)]
    steps = list(stochastic_steps(0.25, 5))
    assert steps == [0, 1, 2, 3]
    noise = torch.stack([run.noise(Stream.STEP_NOISE, rows, step) for step in steps], dim=1)
    initial = run.noise(Stream.INITIAL_LATENTS, rows)
    plain = sample(run.generator.bind(None, None), initial, run.sampler, stochastic=steps, step_noise=noise).latents  # type: ignore[arg-type]
    order = [
        number * 3 + place
        for number in range(2)
        for place in plain.view(2, 3)[number].argsort(descending=True).tolist()
    ]
    assert torch.equal(particles.latents, plain[order])
    assert torch.equal(scores, plain[order].flatten())
    assert all(check.kept == list(range(6)) for check in run.trace[:-1])
    torch.testing.assert_close(run.trace[-1].weights, torch.full((6,), 1 / 3))
    assert run.generator.calls.rollout == 30 + 30  # of the search, and of the plain sampling here


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_weights_without_resampling_are_those_of_the_end_whatever_the_checks(potential: str) -> None:
    ends = []
    for checks in ((0.2, 0.4, 0.6), (0.6,)):
        run = gaussian_run(budget=6, keep=6)
        FKSteering(potential=potential, strength=1.5, checks=checks, ess_threshold=0.0).run(run)  # type: ignore[arg-type]
        end = run.trace[-1]
        torch.testing.assert_close(end.weights, (1.5 * end.scores).softmax(dim=0))
        assert all(
            check.parent == list(check_before.nodes)
            for check_before, check in zip(run.trace, run.trace[1:], strict=False)
        )
        ends.append(end.weights)
    assert torch.equal(*ends)


def test_potentials_at_a_check_by_hand() -> None:
    for potential in ("difference", "max", "sum"):
        run = gaussian_run(budget=4)
        settings = FKSteering(potential=potential, checks=(0.2, 0.4), strength=2.0, ess_threshold=0.0)  # type: ignore[arg-type]
        settings.run(run)
        first, second = run.trace[0].scores, run.trace[1].scores
        total = {
            "difference": 2 * second,
            "max": 2 * first + 2 * torch.maximum(first, second),
            "sum": 2 * first + 2 * (first + second),
        }[potential]
        torch.testing.assert_close(run.trace[1].weights, total.softmax(dim=0))


def test_a_linear_schedule_reaches_the_same_target() -> None:
    run = gaussian_run(budget=4)
    FKSteering(schedule="linear", strength=2.0, checks=(0.4,), ess_threshold=0.0).run(run)
    torch.testing.assert_close(run.trace[0].weights, (2.0 * 0.4 * run.trace[0].scores).softmax(dim=0))
    torch.testing.assert_close(run.trace[-1].weights, (2.0 * run.trace[-1].scores).softmax(dim=0))


@pytest.mark.parametrize("potential", ["difference", "max"])
def test_the_target_of_a_tilted_gaussian(potential: str) -> None:
    # x_0 ~ N(0, v), r = x_0: base * exp(l r) is N(l v, v), with the variance v that this sampler ends with.
    plain = gaussian_run(steps=8, budget=600, keep=600, seed=3)
    base, _ = FKSteering(strength=0.0).run(plain)
    variance = float(base.latents.var())
    run = gaussian_run(steps=8, budget=600, keep=600, seed=4)
    FKSteering(potential=potential, strength=0.8, ess_threshold=0.5).run(run)  # type: ignore[arg-type]
    end = run.trace[-1]
    assert end.weights is not None
    mean = float((end.weights * end.scores).sum())
    spread = float((end.weights * (end.scores - mean) ** 2).sum())
    assert mean == pytest.approx(0.8 * variance, abs=0.12)
    assert spread == pytest.approx(variance, abs=0.2)


def test_resampling_is_inside_prompts_and_duplicates_part() -> None:
    run = gaussian_run(prompts=3, budget=6, keep=6)
    particles, _ = FKSteering(strength=8.0, checks=(0.2, 0.4, 0.6), ess_threshold=1.0).run(run)
    resampled = run.trace[0]
    assert sorted(set(resampled.kept)) != list(range(18))
    assert [row // 6 for row in resampled.kept] == [0] * 6 + [1] * 6 + [2] * 6
    # Another prompt more or less changes nothing for the first.
    alone = gaussian_run(prompts=1, budget=6, keep=6)
    FKSteering(strength=8.0, checks=(0.2, 0.4, 0.6), ess_threshold=1.0).run(alone)
    assert torch.equal(alone.trace[0].scores, resampled.scores[:6])
    assert alone.trace[0].kept == resampled.kept[:6]
    assert len(run.trace[1].scores.unique()) == 18
    assert all(0 < size <= 6 for size in resampled.effective().values())
    assert particles.prompt == [0] * 6 + [1] * 6 + [2] * 6


def test_weights_carry_over_checks_that_do_not_resample() -> None:
    run = gaussian_run(budget=8)
    FKSteering(strength=0.3, checks=(0.2, 0.4), ess_threshold=0.01).run(run)
    torch.testing.assert_close(run.trace[1].weights, (0.3 * run.trace[1].scores).softmax(dim=0))


def test_systematic_resampling_names_each_as_often_as_its_weight_says() -> None:
    weights = torch.tensor([0.05, 0.5, 0.0, 0.45], dtype=torch.float64)
    for offset in (0.0, 0.3, 0.999999):
        counts = torch.bincount(torch.tensor(systematic_resampling(weights, offset)), minlength=4)
        assert all(
            int(4 * w) <= count <= int(4 * w) + 1 for w, count in zip(weights.tolist(), counts.tolist(), strict=True)
        )
    mean = (
        torch.stack(
            [torch.bincount(torch.tensor(systematic_resampling(weights, i / 200)), minlength=4) for i in range(200)]
        )
        .double()
        .mean(dim=0)
    )
    torch.testing.assert_close(mean, 4 * weights, atol=0.011, rtol=0)


def test_huge_scores_do_not_overflow() -> None:
    weights = normalised_weights(torch.tensor([1000.0, 1001.0, -5000.0, 7.0]), [0, 0, 0, 1])
    torch.testing.assert_close(weights, torch.tensor([0.2689, 0.7311, 0.0, 1.0]), atol=1e-4, rtol=0)
