from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dina_reward.alignment.sampling.rollout import sample
from dina_reward.alignment.sampling.samplers import DDIMSampler, FlowSampler, Sampler, build_sampler
from dina_reward.alignment.sampling.seeding import noise_by_row
from dina_reward.alignment.sampling.solver import MultistepSolver
from tests.alignment.helpers import LATENT_SHAPE


FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


def model(latents: Tensor, timestep: Tensor) -> Tensor:
    return torch.sin(latents.float() + timestep.reshape(-1, 1, 1, 1) / 1000)


def grid_of(solver: DPMSolverMultistepScheduler, flow: bool) -> Sampler:
    timesteps = solver.timesteps.float()
    if flow:
        return FlowSampler(solver.sigmas.float(), timesteps)
    alphas = 1 / (1 + solver.sigmas.float() ** 2)  # diffusers keeps noise / signal
    return DDIMSampler(alphas, timesteps)


@pytest.mark.parametrize("flow", [True, False], ids=("flow", "ddpm"))
def test_second_order_is_that_of_diffusers(flow):
    process = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if flow else {}
    theirs = DPMSolverMultistepScheduler(**process, final_sigmas_type="zero", flow_shift=3.0)
    theirs.set_timesteps(7)
    initial = noise_by_row([1, 2], LATENT_SHAPE)
    rollout = sample(model, initial, grid_of(theirs, flow), solver_order=2)
    latents = initial
    for timestep in theirs.timesteps:
        latents = theirs.step(model(latents, timestep.float().expand(2)), timestep, latents).prev_sample
    torch.testing.assert_close(rollout.latents, latents, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rollout.latents, sample(model, initial, grid_of(theirs, flow)).latents, atol=1e-3)


def test_its_error_falls_with_the_square_of_the_step():
    """On the flow between a standard Gaussian and one of deviation 1/2, whose states at every level are known."""

    def deviation(level: Tensor) -> Tensor:
        return (level**2 + 0.25 * (1 - level) ** 2).sqrt()

    def velocity(latents: Tensor, timestep: Tensor) -> Tensor:
        level = timestep.reshape(-1, 1, 1, 1) / 1000
        return latents * (level - 0.25 * (1 - level)) / deviation(level) ** 2

    initial = noise_by_row([1, 2], LATENT_SHAPE)

    def error(steps: int, order: int) -> float:
        sigmas = torch.linspace(0.9, 0.1, steps + 1)
        sampler = FlowSampler(sigmas, 1000 * sigmas[:-1])
        end = sample(velocity, initial, sampler, solver_order=order).latents
        return float((end - initial * deviation(sigmas[-1]) / deviation(sigmas[0])).abs().mean())

    for order in (1, 2):
        errors = [error(steps, order) for steps in (16, 32, 64)]
        for coarse, fine in itertools.pairwise(errors):
            assert coarse / fine == pytest.approx(2**order, rel=0.2)
    assert error(16, 2) < error(64, 1)


def test_the_first_order_is_the_sampler_s_own_step():
    sampler, initial = build_sampler(FLOW, 5), noise_by_row([1], LATENT_SHAPE)
    latents = initial
    for index in range(5):
        latents = sampler.step(index, latents, model(latents, sampler.timesteps[index].expand(1)))
    assert torch.equal(sample(model, initial, sampler, solver_order=1).latents, latents)


def test_a_stochastic_step_in_between_is_forgotten():
    sampler = build_sampler(FLOW, 6, sde_type="cps", eta=0.5)
    initial, noise = noise_by_row([1, 2], LATENT_SHAPE), noise_by_row([3, 4], (1, *LATENT_SHAPE))
    rollout = sample(model, initial, sampler, solver_order=2, stochastic=[2], step_noise=noise)
    on = sample(model, rollout.states[3], sampler, solver_order=2, start=3)
    torch.testing.assert_close(rollout.latents, on.latents)


@pytest.mark.parametrize("order", [0, 3, "2"])
def test_other_orders_are_refused(order):
    with pytest.raises(ValueError, match="solver_order must be 1"):
        MultistepSolver(build_sampler(FLOW, 4), order)
