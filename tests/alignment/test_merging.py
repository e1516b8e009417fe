"""Sampling with the LoRA merged into the weights: the same predictions, and weights that come back bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward, LatentRewardConfig
from dina_reward.alignment import DiffusionGRPOTrainer, RewardBackpropConfig
from dina_reward.search import SearchDistillationConfig
from tests.alignment.helpers import (
    LATENT_SHAPE,
    PROMPTS,
    algorithm_trainer,
    logged,
    lora_tensors,
    tiny_config,
    tiny_trainer,
)
from tests.alignment.tiny_policy import make_policy, randomise, tiny_pipeline, velocity_of
from tests.tiny_models import tiny_sd_pipeline


def frozen(policy: Any) -> list[Tensor]:
    return [p.detach().clone() for p in policy.denoiser.parameters() if not p.requires_grad]


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sd_pipeline])
def test_predictions_are_the_same_and_weights_come_back(make: Any) -> None:
    policy = make_policy(pipeline=make())
    randomise(policy)
    if make is tiny_sd_pipeline:
        shape, before = (4, 8, 8), frozen(policy)
        latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        bound = policy.bind(policy.encode(["a cat", "a dog"], torch.device("cpu")), None)
        with torch.no_grad():
            beside = bound(latents, torch.full((2,), 500.0))
            with policy.merged():
                merged = bound(latents, torch.full((2,), 500.0))
            again = bound(latents, torch.full((2,), 500.0))
    else:
        before, beside = frozen(policy), velocity_of(policy)
        with policy.merged():
            merged = velocity_of(policy)
        again = velocity_of(policy)
    torch.testing.assert_close(merged, beside, atol=2e-5, rtol=1e-4)
    assert torch.equal(again, beside)
    assert all(torch.equal(one, other) for one, other in zip(before, frozen(policy), strict=True))


def test_the_lora_is_merged_and_its_layers_are_not_run() -> None:
    policy = make_policy()
    randomise(policy)
    with policy.reference():
        base = velocity_of(policy)
    with policy.merged():
        assert float((velocity_of(policy) - base).abs().max()) > 1e-3
        calls = []
        hooks = [
            module.register_forward_hook(lambda *_: calls.append(1))
            for name, module in policy.denoiser.named_modules()
            if "lora_A." in name
        ]
        velocity_of(policy)
        assert hooks
        assert not calls
        for hook in hooks:
            hook.remove()


def test_weights_come_back_after_an_error_and_in_16_bits() -> None:
    policy = make_policy(dtype=torch.bfloat16)
    randomise(policy)
    before, beside = frozen(policy), velocity_of(policy)
    with pytest.raises(RuntimeError, match="stopped"), policy.merged():
        raise RuntimeError("stopped")
    assert all(torch.equal(one, other) for one, other in zip(before, frozen(policy), strict=True))
    assert torch.equal(velocity_of(policy), beside)


def test_what_has_no_lora_to_merge_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="trained in full, so no LoRA can be merged"),
        make_policy(train_full_model=True).merged(),
    ):
        pass
    for other in ("train_full_model", "load_in_4bit"):
        with pytest.raises(ValueError, match=f"merge_for_rollout .* {other} has none"):
            tiny_config(tmp_path, merge_for_rollout=True, **{other: True})


def test_trainers_that_sample_their_own_way_refuse_it(tmp_path: Path) -> None:
    for config in (RewardBackpropConfig, SearchDistillationConfig):
        with pytest.raises(ValueError, match=f"merge_for_rollout does nothing under {config.__name__}"):
            config(str(tmp_path), merge_for_rollout=True, use_cpu=True)


def shared_reward(pipeline: Any) -> LatentReward:
    settings = LatentRewardConfig(family="sd3", num_layers=1, visual_taps=(1,), max_sequence_length=8)
    return LatentReward.from_config(settings, pipeline=pipeline, share_backbone=True).eval()


def test_a_reward_on_the_same_weights_scores_in_between(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    reward = shared_reward(pipeline)
    latents = torch.randn((3, *LATENT_SHAPE), generator=torch.Generator().manual_seed(0))
    before = reward(latents, PROMPTS[:3], seed=1)
    config = tiny_config(tmp_path, gradient_accumulation_steps=2, merge_for_rollout=True)
    trainer = DiffusionGRPOTrainer(pipeline, reward, config, PROMPTS)
    trainer.train()
    assert torch.equal(reward(latents, PROMPTS[:3], seed=1), before)
    overlapped = tiny_config(tmp_path / "other", merge_for_rollout=True, reward_overlap=True)
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="merge_for_rollout and reward_overlap exclude each other"):
        DiffusionGRPOTrainer(pipeline, shared_reward(pipeline), overlapped, PROMPTS)


def test_ratios_start_at_one_up_to_rounding(tmp_path: Path) -> None:
    """Log-probabilities are sums over all elements of a state, so the rounding of predictions adds up in them."""
    trainer = tiny_trainer(tmp_path, merge_for_rollout=True, gradient_accumulation_steps=2)
    randomise(trainer.policy)
    trainer.train()
    deviation = [abs(math.log(ratio)) for name in ("ratio/min", "ratio/max") for ratio in logged(trainer, name)]
    assert max(deviation) < 1e-3
    assert max(deviation) > 0  # the merged model has sampled


def test_a_trainer_without_ratios_trains_as_it_does_unmerged(tmp_path: Path) -> None:
    runs = []
    for merge in (False, True):
        trainer = algorithm_trainer("nft", tmp_path / str(merge), merge_for_rollout=merge, max_steps=4)
        trainer.train()
        runs.append((lora_tensors(trainer), logged(trainer, "reward")))
    (beside, rewards), (merged, merged_rewards) = runs
    assert merged_rewards == pytest.approx(rewards, abs=1e-4)
    for name, tensor in beside.items():
        torch.testing.assert_close(merged[name], tensor, atol=2e-3, rtol=1e-2)
