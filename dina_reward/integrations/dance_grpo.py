"""DanceGRPO, which has no reward function: scoring is written into its sampling loop, one sample at a time.

    score = as_row_reward(reward)
    rewards = score(latents, batch_caption)                              # Stable Diffusion: in place of the decode
    rewards = score(latents, batch_caption, height=h, width=w)           # FLUX: before latents are unpacked

A policy under FSDP cannot lend its backbone: load the reward with ``share_backbone=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dina_reward.checks.tensors import check_numbers
from dina_reward.integrations.scoring import LatentScorer


def as_row_reward(reward: Callable[..., Tensor], *, seed: int = 0, **options: Any) -> Callable[..., Tensor]:
    """``fn(latents, captions, **size) -> scores`` of shape ``(batch,)``, float32, on the device of the latents.

    Args:
        reward: a `LatentReward`.
        seed, options: as for `LatentScorer`.
    """
    scorer = LatentScorer(reward, seed, options=options)

    def score(latents: Tensor, captions: str | Sequence[str], **size: Any) -> Tensor:
        check_numbers("latents", latents, floating=True)
        prompts = [captions] * len(latents) if isinstance(captions, str) else captions
        return scorer(latents, prompts, **size)

    return score
