"""Whether a policy has left what its reward was trained on: by features, by the reward's own doubt, by the judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dina_reward.checks.values import check_fields
from dina_reward.noise.draws import draw_noise
from dina_reward.reward import LatentReward


_LEVELS = (0.2, 0.4, 0.6)
_EPS = 1e-6


@dataclass(frozen=True)
class DriftSettings:
    """When a reward counts as out of its depth; a limit of None is not looked at.

    Args:
        every: generations between two checks.
        samples: of the policy, that a check draws.
        max_distance: of the mean of the features from that of the reference, see `DriftSnapshot.distance`.
        max_spread: mean spread of a sample's score over noise levels, over that of the reference.
        min_accuracy: of the reward against the judge, on pairs of fresh samples.
        judgements: that measuring it takes at each check.
    """

    every: int = 5
    samples: int = 32
    max_distance: float | None = 0.5
    max_spread: float | None = 1.5
    min_accuracy: float | None = None
    judgements: int = 24

    def __post_init__(self) -> None:
        check_fields(
            self,
            every=(1, math.inf),
            samples=(4, 100_000),
            max_distance=(0, math.inf),
            max_spread=(0, math.inf),
            min_accuracy=(0, 1),
            judgements=(1, math.inf),
        )


@dataclass(frozen=True)
class DriftSnapshot:
    """What a reward sees in some samples.

    Args:
        mean, std (`Tensor`): of the features over the samples, shape ``(features,)``, float32.
        spread: mean over the samples of the deviation of the score over noise levels.
    """

    mean: Tensor
    std: Tensor
    spread: float

    def distance(self, reference: DriftSnapshot) -> float:
        """``sqrt(mean_j ((m_j - r_j) / s_j)^2)``: how many deviations of the reference its features' means have moved."""
        moved = (self.mean - reference.mean) / (reference.std + _EPS)
        return float(moved.square().mean().sqrt())

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {"mean": self.mean, "std": self.std, "spread": torch.tensor(self.spread)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> DriftSnapshot:
        """Inverse of `tensors`."""
        return cls(tensors["mean"], tensors["std"], float(tensors["spread"]))


@torch.no_grad()
def snapshot(
    reward: LatentReward, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int], *, batch_size: int
) -> DriftSnapshot:
    """Features and doubt of a reward, on the same noise whenever the seeds are the same.

    Features are the image tokens of every tap, averaged over the image, at the middle one of three noise levels.

    Args:
        reward: the reward.
        latents: samples, shape ``(samples, ...)``.
        prompts, seeds: one per sample.
        batch_size: samples per pass.
    """
    features, spreads = [], []
    point = reward.noise_process.snap(_LEVELS[1])
    for start in range(0, len(latents), batch_size):
        rows = slice(start, start + batch_size)
        part, texts, noise_seeds = latents[rows].to(reward.device), list(prompts[rows]), list(seeds[rows])
        output = reward.score(part, texts, noise_level=_LEVELS, ensemble="mean", seed=noise_seeds)
        spreads.append(output.level_scores.std(dim=1).cpu())
        noisy = reward.noise_process.add_noise(
            part.float(), draw_noise(part, seed=noise_seeds)[0], point.level.to(part.device).expand(len(part))
        )
        conditioning, index = reward.encode_prompts(texts)
        taps = reward.model.features(noisy, point.timestep.expand(len(part)), conditioning, index).visual
        features.append(torch.cat([tap.float().mean(dim=1) for tap in taps], dim=1).cpu())
    stacked = torch.cat(features)
    return DriftSnapshot(stacked.mean(dim=0), stacked.std(dim=0), float(torch.cat(spreads).mean()))


def drift_reasons(settings: DriftSettings, found: DriftSnapshot, reference: DriftSnapshot) -> list[str]:
    """What has gone beyond its limit, in words; nothing if nothing has."""
    reasons = []
    distance, spread = found.distance(reference), found.spread / max(reference.spread, _EPS)
    if settings.max_distance is not None and distance > settings.max_distance:
        reasons.append(f"features moved by {distance:.2f} deviations")
    if settings.max_spread is not None and spread > settings.max_spread:
        reasons.append(f"spread over noise levels grew {spread:.2f} times")
    return reasons
