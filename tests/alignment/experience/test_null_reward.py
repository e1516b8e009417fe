from __future__ import annotations

import pytest
import torch

from dina_reward.alignment.experience.null_reward import null_reward
from tests.alignment.helpers import tiny_trainer


def test_noise_of_the_seeds_alone():
    latents = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    values = null_reward(latents, range(4000))
    assert values.shape == (4000,)
    assert abs(float(values.mean())) < 0.05
    assert float(values.std()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(null_reward(latents[:2] + 1, [7, 3]), values[[7, 3]])


def test_a_group_has_to_differ(tmp_path):
    with pytest.raises(ValueError, match="4 samples have 1 different seeds.* share_noise_within_group to false"):
        null_reward(torch.zeros(4, 1), [5] * 4)
    trainer = tiny_trainer(tmp_path, reward_funcs=null_reward, share_noise_within_group=False)
    experience, metrics = trainer.make_experience(0)
    assert metrics["frac_reward_zero_std"] == 0
    rewards = torch.cat([part.rewards for part in experience])
    assert len(rewards.unique()) == 12
