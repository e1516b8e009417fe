from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig

from dina_reward.modeling import LatentRewardConfig
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.modeling.heads.ensemble import EnsembleHead
from dina_reward.reward import LatentReward
from dina_reward.training import LatentRewardTrainer
from tests.training.tiny_reward import LATENT_SHAPE, separable_pairs, training_config


LATENTS = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))


def make(pipeline, members=3):
    config = LatentRewardConfig(
        family="sd3",
        num_layers=2,
        visual_taps=(1, 2),
        text_taps=(1,),
        max_sequence_length=8,
        head=RewardHeadConfig(num_members=members),
    )
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v"])
    return LatentReward.from_config(config, pipeline=pipeline, lora_config=lora)


def test_the_score_is_the_mean_of_its_members(sd3_pipeline, tmp_path):
    reward = make(sd3_pipeline).eval()
    assert isinstance(reward.model.head, EnsembleHead)
    out = reward.score(LATENTS, "a cat", seed=0, kappa=1.0)
    each = []
    for head in reward.model.head.heads:
        alone = make(sd3_pipeline, members=1).eval()
        alone.model.head.load_state_dict(head.state_dict())
        each.append(alone(LATENTS, "a cat", seed=0))
    members = torch.stack(each)
    torch.testing.assert_close(out.spread, members.std(dim=0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.scores, members.mean(0) - members.std(0), atol=1e-5, rtol=1e-4)
    tokens = reward.score(LATENTS, "a cat", seed=0, noise_level=(0.2, 0.5), kappa=1.0)
    assert bool((tokens.spread > 0).all())
    reward.save_pretrained(tmp_path / "reward")
    loaded = LatentReward.from_pretrained(tmp_path / "reward", pipeline=sd3_pipeline)
    torch.testing.assert_close(loaded(LATENTS, "a cat", seed=0), reward(LATENTS, "a cat", seed=0))


def test_members_train_on_their_own_pairs(sd3_pipeline, tmp_path):
    reward = make(sd3_pipeline)
    before = [{name: p.detach().clone() for name, p in head.named_parameters()} for head in reward.model.head.heads]
    pairs = separable_pairs(16)
    trainer = LatentRewardTrainer(reward, training_config(tmp_path, max_steps=2), train_dataset=pairs)
    trainer.train()
    for old, head in zip(before, reward.model.head.heads, strict=True):
        assert any(not torch.equal(p, old[name]) for name, p in head.named_parameters())
    moved = [
        (head.head.weight.detach() - old["head.weight"]).abs().sum()
        for old, head in zip(before, reward.model.head.heads, strict=True)
    ]
    assert len({float(change) for change in moved}) > 1


def test_how_many_members(sd3_pipeline):
    with pytest.raises(ValueError, match="num_members must be an integer from 1 to 64, got 0"):
        RewardHeadConfig(num_members=0)
    config = make(sd3_pipeline, members=2).config
    assert LatentRewardConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="spread_scale must not be negative"):
        replace(config, spread_scale=-1.0)
