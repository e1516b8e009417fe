from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal

from dina_reward.alignment.sampling.steps import (
    check_eta,
    cps_transition,
    dance_sde_transition,
    euler_step,
    flow_sde_transition,
    log_prob,
    transition,
)


ETAS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}


@pytest.fixture
def state() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, velocity, noise = torch.randn((3, 5, 4, 6, 6), generator=generator)
    return latents, velocity, noise


def sigmas(pair: tuple[float, float] = (0.8, 0.6)) -> tuple[Tensor, Tensor]:
    return torch.tensor(pair[0]), torch.tensor(pair[1])


def test_euler_step_equals_the_scheduler(state):
    latents, velocity, _ = state
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    expected, actual = latents, latents
    for index, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(velocity, timestep, expected, return_dict=False)[0]
        actual = euler_step(actual, velocity, scheduler.sigmas[index], scheduler.sigmas[index + 1])
        assert torch.equal(actual, expected)


def test_flow_sde_matches_its_formula(state):
    latents, velocity, _ = state
    s, s_next, eta = 0.8, 0.6, 0.7
    step = flow_sde_transition(latents, velocity, *sigmas((s, s_next)), eta)
    g = eta * math.sqrt(s / (1 - s))
    delta = s_next - s
    mean = latents * (1 + g**2 * delta / (2 * s)) + velocity * (1 + g**2 * (1 - s) / (2 * s)) * delta
    torch.testing.assert_close(step.mean, mean)
    assert float(step.std) == pytest.approx(g * math.sqrt(-delta))
    assert float(step.diffusion) == pytest.approx(g)


def test_flow_sde_uses_the_next_sigma_where_the_formula_divides_by_zero(state):
    latents, velocity, _ = state
    step = flow_sde_transition(latents, velocity, *sigmas((1.0, 0.9)), 0.7)
    assert float(step.diffusion) == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)), rel=1e-5)
    assert torch.isfinite(step.mean).all()


def test_dance_sde_equals_flow_sde_where_their_coefficients_meet(state):
    # g_flow = eta' sqrt(s / (1 - s)) equals g_dance = eta when s = 1/2 and eta' = eta.
    latents, velocity, _ = state
    flow = flow_sde_transition(latents, velocity, *sigmas((0.5, 0.3)), 0.5)
    dance = dance_sde_transition(latents, velocity, *sigmas((0.5, 0.3)), 0.5)
    torch.testing.assert_close(flow.mean, dance.mean)
    torch.testing.assert_close(flow.std, dance.std)


@pytest.mark.parametrize("s", [0.3, 0.5, 0.9])
def test_dance_sde_is_flow_sde_with_its_coefficient_as_eta(state, s):
    latents, velocity, _ = state
    flow = flow_sde_transition(latents, velocity, *sigmas((s, s / 2)), 0.7)
    dance = dance_sde_transition(latents, velocity, *sigmas((s, s / 2)), float(flow.diffusion))
    torch.testing.assert_close(flow.mean, dance.mean)
    torch.testing.assert_close(flow.std, dance.std)


@pytest.mark.parametrize("eta", [0.2, 0.8, 1.0])
@pytest.mark.parametrize("pair", [(1.0, 0.9), (0.6, 0.3), (0.3, 0.01)])
def test_cps_leaves_exactly_the_next_noise_level(eta, pair):
    # With the exact velocity v = x_1 - x_0 the mean is (1 - s') x_0 + kept x_1, and kept^2 + std^2 = s'^2.
    x0, x1 = torch.randn((2, 1, 1000), generator=torch.Generator().manual_seed(0))
    s, s_next = sigmas(pair)
    step = cps_transition((1 - s) * x0 + s * x1, x1 - x0, s, s_next, eta)
    kept = ((step.mean - (1 - s_next) * x0) / x1).median()
    assert float(torch.sqrt(kept**2 + step.std**2)) == pytest.approx(float(s_next), rel=1e-3)


def test_cps_without_noise_is_the_ode(state):
    latents, velocity, _ = state
    step = cps_transition(latents, velocity, *sigmas(), 0.0)
    torch.testing.assert_close(step.mean, euler_step(latents, velocity, *sigmas()))


@pytest.mark.parametrize("sde_type", ["flow_sde", "dance_sde"])
def test_log_prob_is_the_mean_gaussian_log_density(state, sde_type):
    latents, velocity, noise = state
    step = transition(sde_type, latents, velocity, *sigmas(), ETAS[sde_type])
    taken = step.mean + step.std * noise
    density = Normal(step.mean, step.std).log_prob(taken)
    actual = log_prob(sde_type, step, taken)
    torch.testing.assert_close(actual, density.flatten(1).mean(1))
    assert actual.shape == (5,)
    torch.testing.assert_close(step.std, step.diffusion * step.delta.sqrt())
    torch.testing.assert_close(step.delta, torch.tensor(0.2))


def test_cps_log_prob_has_no_constants(state):
    latents, velocity, noise = state
    step = transition("cps", latents, velocity, *sigmas(), 0.8)
    taken = step.mean + step.std * noise
    torch.testing.assert_close(log_prob("cps", step, taken), -((taken - step.mean) ** 2).flatten(1).mean(1))
    assert float(step.delta) == 1


@pytest.mark.parametrize("sde_type", list(ETAS))
def test_half_precision_inputs_are_computed_in_float32(state, sde_type):
    latents, velocity, _ = (tensor.to(torch.bfloat16) for tensor in state)
    step = transition(sde_type, latents, velocity, *sigmas(), ETAS[sde_type])
    wide = transition(sde_type, latents.float(), velocity.float(), *sigmas(), ETAS[sde_type])
    assert step.mean.dtype == torch.float32
    assert torch.equal(step.mean, wide.mean)


@pytest.mark.parametrize("sde_type", list(ETAS))
@pytest.mark.parametrize("eta", [0.0, -0.1, math.nan, math.inf])
def test_deterministic_steps_have_no_log_prob(state, sde_type, eta):
    latents, velocity, _ = state
    with pytest.raises(ValueError, match="no log-probability"):
        transition(sde_type, latents, velocity, *sigmas(), eta)


@pytest.mark.parametrize("sde_type", ["cps", "ddim"])
def test_all_noise_may_be_drawn_anew(sde_type):
    check_eta(sde_type, 1.0)
    with pytest.raises(ValueError, match=f"{sde_type} takes 0 < eta <= 1"):
        check_eta(sde_type, 1.01)


def test_bad_steps_are_refused(state):
    latents, velocity, _ = state
    with pytest.raises(ValueError, match="unknown sde_type 'euler'"):
        transition("euler", latents, velocity, *sigmas(), 0.5)
    with pytest.raises(ValueError, match="'ddim' is not a step of a flow-matching sampler"):
        transition("ddim", latents, velocity, *sigmas(), 0.5)
    with pytest.raises(ValueError, match="cps takes 0 < eta <= 1"):
        transition("cps", latents, velocity, *sigmas(), 1.1)
    with pytest.raises(ValueError, match="take the last step with `euler_step`"):
        transition("cps", latents, velocity, *sigmas((0.1, 0.0)), 0.5)
