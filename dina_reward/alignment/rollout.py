"""Sampling loop whose steps inside an SDE window are stochastic and recorded, and whose other steps follow the ODE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.seeding import Stream, generator_from
from dina_reward.alignment.steps import SDEType, euler_step, take_step


VelocityFunction = Callable[[Tensor, Tensor], Tensor]
"""``(latents, timestep of shape (batch,)) -> velocity``, float32, with the prompts already bound."""


@dataclass(frozen=True)
class Schedule:
    """Discretisation of a sampler.

    Args:
        sigmas (`Tensor`): noise levels, shape ``(num_steps + 1,)``, float32, ending at 0. They stay on the CPU, where
            reading one costs no synchronisation.
        timesteps (`Tensor`): what the model is told at each step, shape ``(num_steps,)``, float32, on its device.
    """

    sigmas: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    @classmethod
    def from_scheduler(cls, scheduler: Any, num_inference_steps: int, device: torch.device | str = "cpu") -> Schedule:
        """Copies the grid that a fresh scheduler of this configuration makes; ``scheduler`` itself is not altered.

        The sigmas are never recomputed: with a static shift, `set_timesteps` shifts its end point a second time.

        Raises:
            ValueError: the scheduler is not of the flow-matching kind, or shifts by image size.
        """
        fresh = type(scheduler).from_config(scheduler.config)
        if not hasattr(fresh, "sigmas") or hasattr(fresh, "alphas_cumprod"):
            raise ValueError(
                f"{type(scheduler).__name__} is not a flow-matching scheduler; these samplers need one with sigmas "
                "that fall from 1 to 0, such as FlowMatchEulerDiscreteScheduler"
            )
        if fresh.config.get("use_dynamic_shifting"):
            raise ValueError(
                "this scheduler has use_dynamic_shifting=True, which depends on the image size. Give the pipeline a "
                "scheduler with a fixed `shift` and use_dynamic_shifting=False"
            )
        fresh.set_timesteps(num_inference_steps, device="cpu")
        return cls(
            sigmas=fresh.sigmas.to("cpu", torch.float32, copy=True),
            timesteps=fresh.timesteps.to(device, torch.float32, copy=True),
        )


@dataclass(frozen=True)
class Rollout:
    """Samples of one chunk and what is needed to replay their stochastic steps.

    Args:
        latents (`Tensor`): final latents, shape ``(batch, ...)``. The last step is an ODE step, so they equal its
            ``x_0`` prediction.
        trajectory (`Tensor`): states before and after the stochastic steps, shape ``(batch, window + 1, ...)``.
        log_probs (`Tensor`): of the stochastic steps, shape ``(batch, window)``, float32.
        window (`range`): indices of the stochastic steps in the schedule.
    """

    latents: Tensor
    trajectory: Tensor
    log_probs: Tensor
    window: range


def check_sde_window(num_inference_steps: int, size: int, window_range: tuple[int, int]) -> None:
    """Refuses a window that is empty, does not fit into its range, or could contain the last step.

    Raises:
        ValueError: naming the fault.
    """
    low, high = window_range
    if high > num_inference_steps - 1:
        raise ValueError(
            f"sde_window_range [{low}, {high}) includes the last of {num_inference_steps} steps, which ends at sigma 0 "
            f"and is never trained; the upper end may be at most {num_inference_steps - 1}"
        )
    if low < 0 or size < 1 or high - low < size:
        raise ValueError(
            f"sde_window_size {size} does not fit into sde_window_range [{low}, {high}) of {num_inference_steps} steps; "
            "give a size of at least 1 and a range at least as wide"
        )


def draw_sde_window(seed: int, generation: int, size: int, window_range: tuple[int, int]) -> range:
    """The stochastic steps of one generation: a function of ``(seed, generation)``, so all rows and ranks share it."""
    low, high = window_range
    generator = generator_from(seed, Stream.SDE_WINDOW, generation)
    start = int(torch.randint(low, high - size + 1, (1,), generator=generator))
    return range(start, start + size)


@torch.no_grad()
def sample(
    velocity: VelocityFunction,
    initial_latents: Tensor,
    schedule: Schedule,
    *,
    window: range = range(0),
    step_noise: Tensor | None = None,
    sde_type: SDEType = "cps",
    eta: float = 0.8,
) -> Rollout:
    """Denoises a chunk: ODE steps outside ``window``, stochastic and recorded ones inside. No gradient.

    Without a window this is the plain Euler sampler.

    Args:
        velocity (`VelocityFunction`): the policy.
        initial_latents (`Tensor`): standard normal, shape ``(batch, ...)``; their dtype is the storage dtype.
        schedule (`Schedule`): with timesteps on the device of the latents.
        step_noise (`Tensor`, *optional*): standard normal, shape ``(batch, window, ...)``; needed with a window.

    Raises:
        ValueError: the window contains the last step, or the step noise does not fit.
    """
    batch, dtype = initial_latents.shape[0], initial_latents.dtype
    noise = _checked_step_noise(initial_latents, schedule, window, step_noise)
    latents, states = initial_latents, []
    log_probs = initial_latents.new_zeros((batch, len(window)), dtype=torch.float32)
    for index in range(len(schedule)):
        sigma, sigma_next = schedule.sigmas[index], schedule.sigmas[index + 1]
        prediction = velocity(latents, schedule.timesteps[index].expand(batch))
        if index not in window:
            latents = euler_step(latents, prediction, sigma, sigma_next).to(dtype)
            continue
        position = index - window.start
        states.append(latents)
        step = take_step(sde_type, latents, prediction, sigma, sigma_next, eta, noise=noise[:, position], dtype=dtype)
        latents, log_probs[:, position] = step.next_latents, step.log_prob
        if index == window[-1]:
            states.append(latents)
    trajectory = torch.stack(states, dim=1) if states else initial_latents.new_empty((batch, 0))
    return Rollout(latents=latents, trajectory=trajectory, log_probs=log_probs, window=window)


def _checked_step_noise(latents: Tensor, schedule: Schedule, window: range, step_noise: Tensor | None) -> Tensor:
    expected = (latents.shape[0], len(window), *latents.shape[1:])
    if len(window) == 0:
        return latents.new_empty(expected)
    check_sde_window(len(schedule), len(window), (window.start, window.stop))
    if step_noise is None or step_noise.shape != expected:
        found = None if step_noise is None else tuple(step_noise.shape)
        raise ValueError(f"step_noise has shape {found}; a window of {len(window)} steps needs {expected}")
    return step_noise
