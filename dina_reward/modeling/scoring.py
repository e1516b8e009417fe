"""One batched pass over all levels and noise draws of a batch of clean latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dina_reward.checks.values import checked_int
from dina_reward.families import Conditioning
from dina_reward.modeling.model import LatentRewardModel
from dina_reward.modeling.spread import ScoreParts
from dina_reward.noise import NoisePoint, NoiseProcess


Ensemble = Literal["tokens", "mean"]
NoiseLevel = float | Sequence[float]


@dataclass(frozen=True)
class RewardOutput:
    """What `LatentReward.score` returns; all tensors float32, ``batch`` rows, on the reward's device.

    Args:
        scores (`Tensor`): shape ``(batch,)``, averaged over noise draws.
        level_scores (`Tensor`): score at each level on its own, shape ``(batch, levels)``, averaged over noise draws.
        noise_std (`Tensor`, *optional*): standard deviation of the score over noise draws, shape ``(batch,)``;
            ``None`` with a single draw.
        noise_levels (`Tensor`): levels after snapping to the grid, shape ``(levels,)``.
        timesteps (`Tensor`): their timesteps, shape ``(levels,)``.
        spread (`Tensor`, *optional*): with conservative scoring, the standard error that ``kappa`` of was taken off, shape
            ``(batch,)``.
    """

    scores: Tensor
    level_scores: Tensor
    noise_std: Tensor | None
    noise_levels: Tensor
    timesteps: Tensor
    spread: Tensor | None = None


@dataclass(frozen=True)
class NoisyBatch:
    """Clean latents with everything that decides their noisy versions.

    Args:
        latents (`Tensor`): clean latents, shape ``(batch, ...)``.
        draws (`Tensor`): standard normal noise, shape ``(levels, draws, batch, ...)``, or one level of it for all.
        points (`NoisePoint`): grid points of the ensemble, ``levels`` entries.
        conditioning (`Conditioning`): encoded unique prompts.
        prompt_index (`Tensor`): prompt of each latent, shape ``(batch,)``.
    """

    latents: Tensor
    draws: Tensor
    points: NoisePoint
    conditioning: Conditioning
    prompt_index: Tensor

    def rows(self, rows: slice) -> NoisyBatch:
        """Part of the batch."""
        return NoisyBatch(
            self.latents[rows], self.draws[:, :, rows], self.points, self.conditioning, self.prompt_index[rows]
        )


def score_batch(
    model: LatentRewardModel,
    process: NoiseProcess,
    batch: NoisyBatch,
    *,
    ensemble: Ensemble = "tokens",
    batch_size: int | None = None,
) -> ScoreParts:
    """Scores ``batch_size`` latents per backbone pass, each with all its levels, draws and members of the head.

    Raises:
        ValueError: unknown ensemble, or a batch size below one.
    """
    if ensemble not in ("tokens", "mean"):
        raise ValueError(f"ensemble must be 'tokens' or 'mean', got {ensemble!r}")
    count = len(batch.latents)
    step = count if batch_size is None else checked_int("batch_size", batch_size, 1)
    parts = [
        _score_rows(model, process, batch.rows(slice(start, start + step)), ensemble)
        for start in range(0, count, step)
    ]
    names = ("draws", "levels", "members")
    return ScoreParts(**{name: torch.cat([getattr(part, name) for part in parts], dim=-1) for name in names})


def _score_rows(model: LatentRewardModel, process: NoiseProcess, batch: NoisyBatch, ensemble: Ensemble) -> ScoreParts:
    levels, (samples, count) = len(batch.points.level), batch.draws.shape[1:3]
    singles = (1,) * (batch.latents.ndim - 1)
    clean = batch.latents.float().repeat(levels * samples, *singles)
    noise = batch.draws.expand(levels, *batch.draws.shape[1:]).flatten(0, 2)
    noisy = process.add_noise(clean, noise, batch.points.level.repeat_interleave(samples * count))
    features = model.features(
        noisy,
        batch.points.timestep.repeat_interleave(samples * count),
        batch.conditioning,
        batch.prompt_index.repeat(levels * samples),
    )
    # A pass over the members gives their mean, too.
    each = model.head_scores(features).view(-1, levels, samples, count)
    if levels > 1 and ensemble == "tokens":
        members = model.head_scores(features, levels).view(-1, samples, count)
    else:
        members = each.mean(dim=1)
    return ScoreParts(members.mean(dim=0), each.mean(dim=0), members)
