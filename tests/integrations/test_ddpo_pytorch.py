"""ddpo-pytorch: a name in its module of rewards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.integrations import register
from tests.integrations.conftest import PROMPTS, agree


def test_found_by_name_and_called_in_a_pool(reward: LatentReward, latents: Tensor, direct: Tensor) -> None:
    rewards = ModuleType("rewards")
    register(rewards, reward)
    reward_fn = rewards.latent_reward()
    trajectory = torch.stack([torch.zeros_like(latents), latents], dim=1)
    with ThreadPoolExecutor(max_workers=2) as executor:
        scores, metadata = executor.submit(reward_fn, trajectory[:, -1], PROMPTS, ({}, {}, {})).result()
    assert metadata == {}
    agree("ddpo-pytorch", scores, direct, 0)
