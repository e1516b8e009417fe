from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from dina_reward.alignment.sampling.ddim import ddim_transition, split_prediction
from dina_reward.alignment.sampling.steps import gaussian_log_prob


def state():
    return torch.randn((2, 3, 4, 5, 5), generator=torch.Generator().manual_seed(0))


@given(st.floats(0.01, 0.99))
def test_all_predictions_of_one_state_split_alike(alpha):
    abar = torch.tensor(alpha)
    clean, noise = state()
    latents = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    outputs = {"epsilon": noise, "sample": clean, "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * clean}
    for kind, output in outputs.items():
        found_clean, found_noise = split_prediction(latents, output, abar, kind)
        torch.testing.assert_close(found_clean, clean, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found_noise, noise, rtol=1e-3, atol=1e-3)


@given(st.floats(0.05, 0.9), st.floats(0.01, 0.09), st.floats(0, 1))
def test_marginal_noise_is_kept(alpha, gap, eta):
    # With the true noise as prediction, the state after the step has the noise level of the next grid point.
    clean, noise = state()
    abar, after = torch.tensor(alpha), torch.tensor(alpha + gap)
    latents = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    step = ddim_transition(latents, noise, abar, after, eta)
    kept = step.mean - after.sqrt() * clean
    total = (kept / noise) ** 2 + step.std**2
    torch.testing.assert_close(total, torch.full_like(total, float(1 - after)), rtol=2e-2, atol=2e-3)


@given(st.floats(0.05, 0.9), st.floats(0.01, 0.09))
def test_the_deterministic_step_ends_at_the_state_of_the_next_level(alpha, gap):
    clean, noise = state()
    abar, after = torch.tensor(alpha), torch.tensor(alpha + gap)
    latents = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    step = ddim_transition(latents, noise, abar, after, eta=0.0)
    torch.testing.assert_close(step.mean, after.sqrt() * clean + (1 - after).sqrt() * noise, rtol=1e-3, atol=1e-3)
    assert float(step.std) == 0


def test_published_std():
    abar, after = torch.tensor(0.3), torch.tensor(0.5)
    latents, output = state()
    step = ddim_transition(latents, output, abar, after, 0.7)
    expected = 0.7 * ((1 - 0.5) / (1 - 0.3)) ** 0.5 * (1 - 0.3 / 0.5) ** 0.5
    assert float(step.std) == pytest.approx(expected)
    assert float(step.diffusion) == pytest.approx(expected)
    density = Normal(step.mean, step.std).log_prob(latents).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_log_prob(step, latents), density)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="unknown prediction_type 'x0'; choose one of epsilon, sample, v_prediction"):
        split_prediction(*state(), torch.tensor(0.5), "x0")
