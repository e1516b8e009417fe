"""Sampling loop whose chosen steps are stochastic, some of them recorded for training, and whose other steps are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.alignment.sampling.seeding import Stream, generator_from
from dina_reward.alignment.sampling.solver import MultistepSolver


PredictFunction = Callable[[Tensor, Tensor], Tensor]
"""``(latents, timestep of shape (batch,)) -> model output``, float32, with the prompts already bound."""

WindowSchedule = Literal["random", "fixed", "sliding"]


@dataclass(frozen=True)
class Rollout:
    """Samples of one chunk and what is needed to replay their recorded steps.

    Args:
        latents (`Tensor`): final latents, shape ``(batch, ...)``. The last step is deterministic, so they equal its
            ``x_0`` prediction (DDIM: up to the level of the last grid point).
        states (`dict[int, Tensor]`): state before step ``i`` under key ``i``; a recorded step ``i`` has ``i`` and
            ``i + 1``. Shape ``(batch, ...)``, storage dtype.
        log_probs (`dict[int, Tensor]`): of the recorded steps, shape ``(batch,)``, float32.
        means (`dict[int, Tensor]`): means of the recorded steps' transitions, float32; only where asked for.
        clean (`dict[int, Tensor]`): ``x_0`` predictions at the recorded states that a stochastic step still follows, storage
            dtype; only where asked for.
        stochastic (`tuple[int, ...]`): the stochastic steps.
    """

    latents: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)
    log_probs: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)
    clean: dict[int, Tensor] = field(default_factory=dict)
    stochastic: tuple[int, ...] = ()

    @property
    def trained(self) -> tuple[int, ...]:
        """The recorded steps, in order."""
        return tuple(sorted(self.log_probs))

    def of_rows(self, index: Tensor) -> Rollout:
        """The samples at some positions, int64, shape ``(rows,)``."""

        def chosen(steps: dict[int, Tensor]) -> dict[int, Tensor]:
            return {step: values[index.to(values.device)] for step, values in steps.items()}

        return Rollout(
            self.latents[index.to(self.latents.device)],
            chosen(self.states),
            chosen(self.log_probs),
            chosen(self.means),
            chosen(self.clean),
            self.stochastic,
        )


def check_sde_window(num_inference_steps: int, size: int, window_range: tuple[int, int]) -> None:
    """Refuses a window that is empty, does not fit into its range, or could contain the last step.

    Raises:
        ValueError: naming the fault.
    """
    low, high = window_range
    if high > num_inference_steps - 1:
        raise ValueError(
            f"sde_window_range [{low}, {high}) includes the last of {num_inference_steps} steps, which ends at the clean "
            f"latent and is never trained; the upper end may be at most {num_inference_steps - 1}"
        )
    if low < 0 or size < 1 or high - low < size:
        raise ValueError(
            f"sde_window_size {size} does not fit into sde_window_range [{low}, {high}) of {num_inference_steps} steps; "
            "give a size of at least 1 and a range at least as wide"
        )


def sde_window(
    seed: int,
    generation: int,
    size: int,
    window_range: tuple[int, int],
    schedule: WindowSchedule = "random",
    interval: int = 1,
    stride: int = 1,
) -> range:
    """The stochastic steps of one generation: a function of ``(seed, generation)``, so all rows and ranks share it.

    | schedule | start of the window |
    |---|---|
    | ``random`` | uniform over the range, drawn anew for every generation (Flow-GRPO-fast) |
    | ``fixed`` | the lower end of the range |
    | ``sliding`` | moves up by ``stride`` every ``interval`` generations, then starts over (MixGRPO, arXiv 2507.21802) |
    """
    low, high = window_range
    positions = high - size - low + 1
    if schedule == "fixed":
        offset = 0
    elif schedule == "sliding":
        offset = (generation // interval) * stride % positions
    elif schedule == "random":
        generator = generator_from(seed, Stream.SDE_WINDOW, generation)
        offset = int(torch.randint(0, positions, (1,), generator=generator))
    else:
        raise ValueError(
            f"unknown sde_window_schedule {schedule!r}; choose one of {', '.join(get_args(WindowSchedule))}"
        )
    return range(low + offset, low + offset + size)


def trained_steps(seed: int, generation: int, stochastic: Sequence[int], fraction: float) -> tuple[int, ...]:
    """A random subset of the stochastic steps, at least one, the same for all rows and ranks of a generation."""
    count = max(1, round(fraction * len(stochastic)))
    generator = generator_from(seed, Stream.TRAINED_STEPS, generation)
    chosen = torch.randperm(len(stochastic), generator=generator)[:count].tolist()
    return tuple(sorted(stochastic[position] for position in chosen))


@torch.no_grad()
def sample(
    predict: PredictFunction,
    initial_latents: Tensor,
    sampler: Sampler,
    *,
    start: int = 0,
    stop: int | None = None,
    solver_order: int = 1,
    stochastic: Sequence[int] = (),
    trained: Sequence[int] | None = None,
    step_noise: Tensor | None = None,
    keep_means: bool = False,
    keep_clean: bool = False,
    offload: bool = False,
) -> Rollout:
    """Denoises a chunk: deterministic steps, stochastic ones where asked for, and a record of those to train. No gradient.

    Args:
        predict (`PredictFunction`): the policy.
        initial_latents (`Tensor`): standard normal, shape ``(batch, ...)``; their dtype is the storage dtype.
        sampler (`Sampler`): with timesteps on the device of the latents.
        start: first step to take; ``initial_latents`` are then the states before it.
        stop: step before which to end; the states before it are returned. By default all steps are taken.
        solver_order: of the deterministic steps: 1 as the sampler takes them, 2 for DPM-Solver++(2M); see `MultistepSolver`.
        stochastic: indices of the stochastic steps, increasing; never the last step.
        trained: those of them to record; all by default.
        step_noise (`Tensor`, *optional*): standard normal, shape ``(batch, len(stochastic), ...)``; needed with stochastic
            steps.
        keep_means: also record the means of the transitions.
        keep_clean: also record ``x_0`` predictions; see `Rollout.clean`.
        offload: keep recorded states and means in host memory.

    Raises:
        ValueError: the last step is stochastic, a trained step is not, the step noise does not fit, or another order.
    """
    batch, dtype = initial_latents.shape[0], initial_latents.dtype
    recorded = tuple(stochastic if trained is None else trained)
    _check_steps(sampler, stochastic, recorded, initial_latents, step_noise)
    kept = {state for index in recorded for state in (index, index + 1)}
    rollout = Rollout(initial_latents, stochastic=tuple(stochastic))
    store = _to_host if offload else _identity
    solver = MultistepSolver(sampler, solver_order)
    latents = initial_latents
    for index in range(start, len(sampler) if stop is None else stop):
        if index in kept:
            rollout.states[index] = store(latents)
        prediction = predict(latents, sampler.timesteps[index].expand(batch))
        if keep_clean and index in kept and index <= stochastic[-1]:
            rollout.clean[index] = store(sampler.predict_clean(index, latents, prediction).to(dtype))
        if index not in stochastic:
            latents = solver.step(index, latents, prediction).to(dtype)
            continue
        assert step_noise is not None
        noise = step_noise[:, stochastic.index(index)]
        step = sampler.take_step(index, latents, prediction, noise=noise, dtype=dtype)
        latents = step.next_latents
        if index in recorded:
            rollout.log_probs[index] = step.log_prob
            if keep_means:
                rollout.means[index] = store(step.transition.mean)
    return replace(rollout, latents=latents)


def _check_steps(
    sampler: Sampler,
    stochastic: Sequence[int],
    recorded: Sequence[int],
    latents: Tensor,
    step_noise: Tensor | None,
) -> None:
    if not stochastic:
        return
    if list(stochastic) != sorted(set(stochastic)) or stochastic[0] < 0 or stochastic[-1] >= len(sampler) - 1:
        raise ValueError(
            f"stochastic steps {list(stochastic)} must increase and lie in [0, {len(sampler) - 1}): the last of "
            f"{len(sampler)} steps ends at the clean latent and is never trained"
        )
    if not set(recorded) <= set(stochastic):
        raise ValueError(f"trained steps {list(recorded)} are not all among the stochastic ones {list(stochastic)}")
    expected = (latents.shape[0], len(stochastic), *latents.shape[1:])
    if step_noise is None or step_noise.shape != expected:
        found = None if step_noise is None else tuple(step_noise.shape)
        raise ValueError(f"step_noise has shape {found}; {len(stochastic)} stochastic steps need {expected}")


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", non_blocking=False)


def _identity(tensor: Tensor) -> Tensor:
    return tensor
