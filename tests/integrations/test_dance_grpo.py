"""DanceGRPO: one sample at a time, concatenated by the client."""

from __future__ import annotations

import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.integrations.dance_grpo import as_row_reward
from tests.integrations.conftest import PROMPTS, agree


def test_rows_one_by_one(reward: LatentReward, latents: Tensor, direct: Tensor) -> None:
    score = as_row_reward(reward)
    rows = [score(latents[i : i + 1], caption) for i, caption in enumerate(PROMPTS)]
    assert [row.shape for row in rows] == [(1,)] * 3
    rewards = torch.cat(rows).to(torch.float32)
    agree("DanceGRPO, row by row", rewards, direct)
    assert torch.allclose(score(latents, list(PROMPTS), height=64, width=64), direct, atol=1e-6)
