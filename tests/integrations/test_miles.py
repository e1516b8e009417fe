"""miles_diffusion: an async function of samples."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.integrations import batched_reward
from tests.integrations.conftest import PROMPTS, agree


def test_scores_of_samples(reward: LatentReward, latents: Tensor, direct: Tensor) -> None:
    samples = [
        SimpleNamespace(
            prompt=prompt, dit_trajectory=SimpleNamespace(latents=torch.stack([torch.zeros_like(row), row]))
        )
        for prompt, row in zip(PROMPTS, latents, strict=True)
    ]
    scores = asyncio.run(batched_reward(reward)(None, samples, rollout_id=3))
    assert all(isinstance(score, float) for score in scores)
    agree("miles_diffusion", scores, direct)


def test_samples_without_a_trajectory(reward: LatentReward) -> None:
    with pytest.raises(ValueError, match="have the rollout return the trajectory"):
        asyncio.run(batched_reward(reward)(None, [SimpleNamespace(prompt="a cat", dit_trajectory=None)]))
