"""miles_diffusion: a batched reward for ``--custom-rm-path my_reward.score``.

# my_reward.py
from dina_reward import LatentReward
from dina_reward.integrations import batched_reward

score = batched_reward(LatentReward.from_pretrained("path/or/id", device="cuda"))
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.integrations.scoring import LatentScorer


def batched_reward(
    reward: Callable[..., Tensor], *, seed: int = 0, score_scale: float = 1.0, score_bias: float = 0.0, **options: Any
) -> Callable[..., Awaitable[list[float]]]:
    """``async fn(args, samples, **kwargs) -> list[float]``; scoring runs in a thread beside the event loop.

    Each sample needs ``prompt`` and ``dit_trajectory.latents``, of shape ``(steps + 1, ...)``, whose last entry is the
    clean latent.

    Args:
        reward: a `LatentReward` with text encoders.
        seed, score_scale, score_bias, options: as for `LatentScorer`.
    """
    scorer = LatentScorer(reward, seed, score_scale, score_bias, options)

    def score_samples(samples: Sequence[Any]) -> list[float]:
        latents = torch.stack([_clean_latent(sample) for sample in samples])
        return scorer(latents, [sample.prompt for sample in samples]).tolist()

    async def latent_reward(args: Any, samples: Sequence[Any], **kwargs: Any) -> list[float]:
        return await asyncio.to_thread(score_samples, samples)

    return latent_reward


def _clean_latent(sample: Any) -> Tensor:
    latents = getattr(getattr(sample, "dit_trajectory", None), "latents", None)
    if latents is None:
        raise ValueError(
            "a sample has no dit_trajectory.latents; have the rollout return the trajectory, whose last latent is scored"
        )
    last: Tensor = latents[-1]
    return last
