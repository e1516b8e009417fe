"""Gradients at inference: the exact shift of a linear reward, its bounds, and optimisation of the noise."""

from __future__ import annotations

import math

import pytest
import torch

from dina_reward.search import BestOfN, Guidance, NoiseOptimization
from dina_reward.search.gradient import capped, moment_penalty, norm_penalty
from tests.search.helpers import gaussian_run


def ends(settings: object, **options: object) -> torch.Tensor:
    run = gaussian_run(budget=6, keep=6, **options)  # type: ignore[arg-type]
    particles, _ = settings.run(run)  # type: ignore[attr-defined]
    order = sorted(range(6), key=lambda row: particles.stream[row])
    return particles.latents[order].flatten()


def test_guidance_moves_a_gaussian_by_the_strength() -> None:
    # Tilting N(0, 1) by exp(l x_0) gives N(l, 1); the linear reward of the state has the gradient that does it exactly.
    plain = ends(BestOfN(), steps=60)
    guided = ends(Guidance(strength=0.5, max_shift=1e6, window=(0.0, 0.999)), steps=60)
    through = ends(Guidance(strength=0.5, max_shift=1e6, window=(0.0, 0.999), target="clean"), steps=60)
    torch.testing.assert_close(guided - plain, torch.full((6,), 0.5), atol=0.15, rtol=0)
    torch.testing.assert_close(through, guided, atol=1e-3, rtol=0)


def test_guidance_takes_one_denoiser_call_per_step_inside_its_window_alone() -> None:
    run = gaussian_run(steps=10, budget=2)
    Guidance(window=(0.35, 0.75)).run(run)
    assert run.generator.calls.rollout == 20
    assert run.generator.calls.reward == 2 * 4 + 2  # levels .7, .6, .5 and .4; and the ends
    clean = gaussian_run(steps=10, budget=2)
    Guidance(window=(0.35, 0.75), target="clean").run(clean)
    assert (clean.generator.calls.rollout, clean.generator.calls.update) == (12, 8)
    with pytest.raises(ValueError, match="window must be two increasing noise levels"):
        Guidance(window=(0.9, 0.1))


def test_the_shift_is_capped_per_row() -> None:
    prediction, moved = torch.ones(2, 4), torch.ones(2, 4) + torch.tensor([[0.01], [5.0]])
    result = capped(prediction, moved, 0.2)
    torch.testing.assert_close(result[0], moved[0])
    torch.testing.assert_close(result[1], torch.full((4,), 1.2))


def test_noise_optimisation_ascends_and_counts() -> None:
    plain, run = gaussian_run(budget=1, shape=(4, 4, 4)), gaussian_run(budget=12, shape=(4, 4, 4))
    _, before = BestOfN().run(plain)
    _, after = NoiseOptimization().run(run)
    assert float(after) > float(before) + 4.0
    assert run.generator.calls.update == 12 * 5
    assert run.generator.calls.rollout == 0
    assert run.generator.calls.reward == 12 + 1
    _, once = NoiseOptimization().run(gaussian_run(budget=1, shape=(4, 4, 4)))
    torch.testing.assert_close(once, before)


def test_the_regulariser_keeps_the_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (3 * torch.randn(2, 64, generator=generator)).requires_grad_()
    (gradient,) = torch.autograd.grad(norm_penalty(noise).sum(), noise)
    norm = noise.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradient, noise.detach() * (1 - 63 / norm**2))
    least = torch.full((1, 64), math.sqrt(63 / 64))
    assert all(float(norm_penalty(least)) <= float(norm_penalty(least * f)) for f in (0.9, 1.1))


def test_moments_see_noise_that_is_not_typical() -> None:
    def penalty(noise: torch.Tensor) -> float:
        return float(moment_penalty(noise[None], torch.Generator().manual_seed(1)))

    typical = torch.randn(256, generator=torch.Generator().manual_seed(2))
    assert penalty(typical) == pytest.approx(2 * math.log(2), abs=0.2)
    assert penalty(typical + 1) > 20
    assert penalty(2 * typical) > 20
