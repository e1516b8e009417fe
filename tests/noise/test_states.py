from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from dina_reward.noise import model_states, rescales_states


BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RESCALING = [
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
]
PLAIN = ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]


def scheduler_of(name: str) -> Any:
    scheduler = getattr(diffusers, name)(**BETAS)
    scheduler.set_timesteps(10)
    return scheduler


@pytest.mark.parametrize("name", RESCALING)
def test_unscaled_states_become_variance_preserving(name: str) -> None:
    scheduler = scheduler_of(name)
    assert rescales_states(scheduler)
    index = 4
    sigma = scheduler.sigmas[index]
    states = torch.randn(3, 4, 8, 8) * (1 + sigma**2) ** 0.5
    torch.testing.assert_close(
        model_states(states, float(scheduler.timesteps[index]), scheduler), states / (1 + sigma**2) ** 0.5
    )
    assert scheduler.step_index is None


def test_rows_may_have_timesteps_of_their_own_and_a_running_sampler_is_not_disturbed() -> None:
    scheduler = scheduler_of("EulerDiscreteScheduler")
    states = torch.ones(2, 4, 1, 1)
    for time in scheduler.timesteps[:3]:
        scheduler.step(scheduler.scale_model_input(states, time), time, states)
    scaled = model_states(states, scheduler.timesteps[[1, 8]], scheduler)
    torch.testing.assert_close(scaled[:, 0, 0, 0], 1 / (1 + scheduler.sigmas[[1, 8]] ** 2) ** 0.5)
    assert scheduler.step_index == 3
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no timestep 123 among its 10 steps"):
        model_states(states, 123, scheduler)


@pytest.mark.parametrize("name", PLAIN)
def test_other_states_are_what_the_model_sees(name: str) -> None:
    scheduler = scheduler_of(name)
    states = torch.randn(2, 4, 2, 2)
    assert model_states(states, 500, scheduler) is states


def test_flow_states_are_what_the_model_sees_and_edm_ones_are_refused() -> None:
    states = torch.randn(2, 4, 2, 2)
    assert model_states(states, 500, diffusers.FlowMatchEulerDiscreteScheduler()) is states
    with pytest.raises(ValueError, match="EDMEulerScheduler belongs to models that are neither"):
        model_states(states, 1.0, diffusers.EDMEulerScheduler())


def test_a_single_step_is_enough_to_tell() -> None:
    euler, ddim = diffusers.EulerDiscreteScheduler(), diffusers.DDIMScheduler()
    for scheduler in (euler, ddim):
        scheduler.set_timesteps(1)
    assert (rescales_states(euler), rescales_states(ddim)) == (True, False)
