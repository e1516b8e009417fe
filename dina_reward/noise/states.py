"""States of diffusers samplers in the model's own process, which some samplers keep in another scale."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.noise.processes import check_known_process


def rescales_states(scheduler: Any) -> bool:
    """Whether a scheduler keeps its states in another scale than its model sees them, as Euler, Heun and LMS do."""
    one = torch.ones(1, device="cpu", dtype=torch.float32)
    return not torch.equal(_model_input(scheduler, one, scheduler.timesteps[0]), one)


def model_states(states: Tensor, timesteps: float | Sequence[float] | Tensor, scheduler: Any) -> Tensor:
    """States as the model sees them: scaled by the scheduler's own `scale_model_input`; the scheduler is left as it is.

    Euler and its kin keep ``x_0 + sigma eps``; their models see ``(x_0 + sigma eps) / sqrt(1 + sigma^2)``. Flow-matching,
    DDIM and DPM-Solver++ schedulers keep what their models see.

    Args:
        states: shape ``(batch, ...)``.
        timesteps: of the states, one for all or one per row; that after step ``i`` is at ``scheduler.timesteps[i + 1]``.
        scheduler: the sampler's, after its `set_timesteps`.

    Raises:
        ValueError: a scheduler that rescales has no such timestep, or belongs to models of another process.
    """
    check_known_process(scheduler.config, type(scheduler).__name__)
    if not rescales_states(scheduler):
        return states
    wanted = torch.atleast_1d(torch.as_tensor(timesteps, dtype=torch.float32, device="cpu"))
    grid = scheduler.timesteps.float().cpu()
    distance, index = (grid[None] - wanted[:, None]).abs().min(dim=1)
    if bool((distance > 1e-3).any()):
        absent = float(wanted[distance.argmax()])
        raise ValueError(
            f"{type(scheduler).__name__} has no timestep {absent:g} among its {len(grid)} steps, so the scale of its states "
            "there is unknown; pass timesteps of its last set_timesteps"
        )
    at = scheduler.timesteps[index.to(scheduler.timesteps.device)].expand(len(states))
    return torch.cat([_model_input(scheduler, states[row : row + 1], time) for row, time in enumerate(at)])


def _model_input(scheduler: Any, states: Tensor, timestep: Tensor) -> Tensor:
    if not hasattr(scheduler, "scale_model_input"):
        return states
    fresh = copy.copy(scheduler)
    # It would count its own steps instead of looking for the timestep.
    fresh._step_index = fresh._begin_index = None
    scaled: Tensor = fresh.scale_model_input(states, timestep)
    return scaled.to(states.dtype)
