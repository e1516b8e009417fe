"""Scores requests that fit together in one pass; runs in the one thread that owns the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dina_reward.families import Conditioning
from dina_reward.noise.draws import draw_noise
from dina_reward.reward import LatentReward
from dina_reward.serving.requests import ScoreRequest


@dataclass(frozen=True)
class Scores:
    """Scores of the rows of one request; as `RewardOutput`, on the CPU.

    Args:
        scores: shape ``(rows,)``.
        level_scores: shape ``(rows, levels)``.
        noise_std: shape ``(rows,)``, with several draws.
        noise_levels, timesteps: after snapping to the grid, shape ``(levels,)``, or ``(rows,)`` where rows have their own.
    """

    scores: Tensor
    level_scores: Tensor
    noise_std: Tensor | None
    noise_levels: Tensor
    timesteps: Tensor


class BatchScorer:
    """Scores batches of requests with one reward.

    Encoded prompts that requests bring stay on the device, the latest ones, each under a name that stands for its content:
    the rows of a group share one, whether they come in one request or in many.

    Args:
        reward: the reward.
        max_batch_size: rows of a pass of the model.
        prompt_cache_size: encoded prompts that stay on the device.
    """

    def __init__(self, reward: LatentReward, max_batch_size: int, prompt_cache_size: int) -> None:
        self.reward = reward
        self.max_batch_size = max_batch_size
        self.prompt_cache_size = prompt_cache_size
        self.cache_hits = 0
        self.cache_misses = 0
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()

    @torch.no_grad()
    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        """Scores requests with equal keys.

        Raises:
            ValueError: a row cannot be scored, or its score is not finite.
        """
        prompts = [prompt for request in requests for prompt in request.prompts]
        known = self._on_device(requests)
        conditioning = Conditioning.cat(list(known.values())) if known else None
        with self.reward.prompt_encoder.given(list(known), conditioning):
            scores = self._score(requests, prompts)
        parts: list[Scores] = []
        start = 0
        for request in requests:
            parts.append(_rows_of(scores, slice(start, start + request.rows), len(prompts)))
            start += request.rows
        return parts

    def _score(self, requests: Sequence[ScoreRequest], prompts: list[str]) -> Scores:
        reward, first = self.reward, requests[0]
        latents = torch.cat([request.latents for request in requests]).to(reward.device)
        step = max(1, self.max_batch_size // first.draws)
        if first.levels is None and not first.noisy:
            return self._score_ensemble(requests, latents, prompts, step)
        common: dict[str, Any] = {"normalize": first.options.normalize, "batch_size": step}
        if first.timesteps is not None:
            timesteps = torch.cat([request.timesteps for request in requests])  # type: ignore[misc]
            points = reward.noise_process.from_timesteps(timesteps)
            scores = reward.score_noisy(latents, prompts, timesteps=timesteps, **common)
        else:
            points = reward.noise_process.snap(torch.cat([request.levels for request in requests]))  # type: ignore[misc]
            if not first.noisy:
                latents = latents.float()
                noise = draw_noise(latents, seed=_seeds(requests))[0]
                latents = reward.noise_process.add_noise(latents, noise, points.level)
            scores = reward.score_noisy(latents, prompts, noise_level=points.level, **common)
        scores = scores.cpu()
        return Scores(scores, scores[:, None], None, points.level, points.timestep)

    def _score_ensemble(
        self, requests: Sequence[ScoreRequest], latents: Tensor, prompts: list[str], step: int
    ) -> Scores:
        options = requests[0].options
        source: dict[str, Any] = {"seed": _seeds(requests)}
        if requests[0].noise is not None:
            noise = torch.cat([request.noise for request in requests])  # type: ignore[misc]
            lead = range(1, noise.ndim - latents.ndim + 1)
            rest = range(noise.ndim - latents.ndim + 1, noise.ndim)
            source = {"noise": noise.permute(*lead, 0, *rest).to(latents.device)}
        output = self.reward.score(
            latents,
            prompts,
            noise_level=options.noise_level,
            ensemble=options.ensemble,
            num_noise_samples=options.num_noise_samples,
            share_noise_across_levels=options.share_noise_across_levels,
            normalize=options.normalize,
            batch_size=step,
            **source,
        )
        std = None if output.noise_std is None else output.noise_std.cpu()
        levels, timesteps = output.noise_levels.cpu(), output.timesteps.cpu()
        return Scores(output.scores.cpu(), output.level_scores.cpu(), std, levels, timesteps)

    def _on_device(self, requests: Sequence[ScoreRequest]) -> dict[str, Conditioning]:
        """Encoded prompts of a batch on the device, in order of first appearance; the latest stay."""
        needed = {
            name: request.embedded[name]
            for request in requests
            for name in request.prompts
            if name in request.embedded
        }
        found: dict[str, Conditioning] = {}
        for name, conditioning in needed.items():
            kept = self._kept.get(name)
            self.cache_hits += kept is not None
            self.cache_misses += kept is None
            # A copy: what came in a body must not keep all of the body.
            found[name] = conditioning.to(self.reward.device, copy=True) if kept is None else kept
        if self.prompt_cache_size:
            for name, conditioning in found.items():
                self._kept[name] = conditioning
                self._kept.move_to_end(name)
            while len(self._kept) > self.prompt_cache_size:
                self._kept.popitem(last=False)
        return found


def _seeds(requests: Sequence[ScoreRequest]) -> list[int]:
    return [seed for request in requests for seed in request.seeds or ()]


def _rows_of(scores: Scores, rows: slice, batch: int) -> Scores:
    own_level = len(scores.noise_levels) == batch and scores.level_scores.shape[1] == 1
    return Scores(
        scores.scores[rows],
        scores.level_scores[rows],
        None if scores.noise_std is None else scores.noise_std[rows],
        scores.noise_levels[rows] if own_level else scores.noise_levels,
        scores.timesteps[rows] if own_level else scores.timesteps,
    )
