"""Searches that take milliseconds: an analytic generator and judge, and a tiny pipeline with an untrained reward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.alignment.costs import CallCounter
from dina_reward.alignment.sampling.samplers import FlowSampler
from dina_reward.modeling.config import LatentRewardConfig
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.noise import FlowMatchingNoise
from dina_reward.search.run import SearchRun
from tests.alignment.tiny_policy import tiny_pipeline


CPU = torch.device("cpu")
SHAPE = (1, 1, 1)
STEPS = 5


class GaussianGenerator:
    """Data are independent standard normal numbers, whose velocity is known: ``E[eps - x_0 | x]``."""

    storage_dtype = torch.float32

    def __init__(self) -> None:
        self.calls = CallCounter()

    def encode(self, prompts: Sequence[str], device: torch.device) -> Any:
        return _Nothing()

    def encode_negative(self, device: torch.device) -> None:
        return None

    def bind(self, conditioning: Any, negative: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            self.calls.count_denoiser(len(latents))
            sigma = timestep.view(-1, *[1] * (latents.ndim - 1)) / 1000
            return latents * (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)

        return predict


class _Nothing:
    def __getitem__(self, rows: Any) -> _Nothing:
        return self


class LinearJudge:
    """Scores the sum of the posterior mean of ``x_0``: ``sum (1 - s) x / ((1 - s)^2 + s^2)``; of clean latents their sum."""

    needs_prediction = False
    is_calibrated = False

    def __init__(self, calls: CallCounter) -> None:
        self.calls = calls

    def unit(self, noise_level: float | None) -> float:
        return 1.0

    def probability(self, better: Tensor, worse: Tensor, noise_level: float | None) -> Tensor:
        return torch.special.ndtr(better - worse)

    def clean(self, latents: Tensor, *facts: Any) -> Tensor:
        self.calls.count_rewards(len(latents))
        return latents.flatten(start_dim=1).sum(dim=1)

    def states(self, states: Tensor, noise_level: float, *facts: Any, clean: Any = None) -> Tensor:
        factor = (1 - noise_level) / ((1 - noise_level) ** 2 + noise_level**2)
        return factor * self.clean(states)

    def differentiable_states(self, states: Tensor, noise_level: float, prompts: Any) -> Tensor:
        return self.states(states, noise_level)

    def differentiable_clean(self, latents: Tensor, *facts: Any) -> Tensor:
        return self.clean(latents)


def gaussian_run(
    *,
    steps: int = STEPS,
    budget: float = 4,
    prompts: int = 1,
    keep: int = 1,
    seed: int = 0,
    eta: float = 0.7,
    batch_size: int = 10_000,
    shape: tuple[int, ...] = SHAPE,
    **options: Any,
) -> SearchRun:
    """A run on the analytic generator, with Flow-SDE as stochastic steps, evenly spaced levels."""
    levels = torch.linspace(1, 0, steps + 1)
    generator: Any = GaussianGenerator()
    run = SearchRun(
        generator=generator,
        judge=LinearJudge(generator.calls),  # type: ignore[arg-type]
        sampler=FlowSampler(levels, levels[:-1] * 1000, "flow_sde", eta),
        prompts=[f"prompt {number}" for number in range(prompts)],
        latent_shape=shape,
        device=CPU,
        budget=budget,
        keep=keep,
        batch_size=batch_size,
        seed=seed,
        **options,
    )
    run.__dict__["process"] = FlowMatchingNoise(levels.flip(0), levels.flip(0) * 1000)
    return run


def closeness(latents: Tensor) -> Tensor:
    """Reward that is highest for latents whose elements are all 0.5."""
    return -((latents.float() - 0.5) ** 2).flatten(1).mean(1)


@functools.cache
def tiny() -> tuple[Any, LatentReward]:
    """The tiny Stable Diffusion 3 pipeline and a reward with random weights on it; treat them as read-only."""
    pipeline = tiny_pipeline()
    config = LatentRewardConfig(
        family="sd3",
        num_layers=1,
        visual_taps=(1,),
        head=RewardHeadConfig(num_attention_heads=4),
        max_sequence_length=8,
    )
    return pipeline, LatentReward.from_config(config, pipeline=pipeline, seed=1).eval()


TINY: dict[str, Any] = {
    "num_inference_steps": STEPS,
    "height": 32,
    "width": 32,
    "max_sequence_length": 8,
    "batch_size": 64,
}
"""Options of `search` for the tiny pipeline."""
