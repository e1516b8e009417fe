"""Scores for clients: noise by prompt, no autocast, pixels encoded or refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.integrations import LatentScorer, as_tuple_reward, prompt_seeds
from tests.integrations.conftest import PROMPTS


CLIENTS = ("trl", "flow_grpo", "flow_factory", "verl_omni", "vllm", "ray")


def test_importing_the_clients_files_imports_no_client() -> None:
    code = (
        "import sys, pkgutil, importlib, dina_reward.integrations as integrations\n"
        "for module in pkgutil.iter_modules(integrations.__path__):\n"
        "    importlib.import_module(f'dina_reward.integrations.{module.name}')\n"
        f"print(sorted(set({CLIENTS}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_equal_prompts_see_equal_noise_in_any_batch(reward: LatentReward, latents: Tensor, direct: Tensor) -> None:
    scorer = LatentScorer(reward)
    scores = scorer(latents, PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, direct)
    assert torch.allclose(
        torch.cat([scorer(latents[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]), scores, atol=1e-5
    )
    twins = scorer(latents[:1].expand(2, -1, -1, -1), ["a cat", "a cat"])
    assert torch.allclose(twins[0], twins[1], atol=1e-5)
    assert not torch.equal(LatentScorer(reward, seed=1)(latents, PROMPTS), scores)


def test_seeds_are_the_same_in_every_process() -> None:
    cat, dog = 7633360363029175380, 4179923079416651252
    assert prompt_seeds(["a cat", "a dog", "a cat"], 3) == [cat, dog, cat]
    assert max(prompt_seeds([str(number) for number in range(200)])) < 2**63


def test_callers_autocast_changes_nothing(reward: LatentReward, latents: Tensor, direct: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LatentScorer(reward)(latents, PROMPTS), direct)


def test_scale_and_options(reward: LatentReward, latents: Tensor, direct: Tensor) -> None:
    score = as_tuple_reward(reward, score_scale=0.1, score_bias=1.0, noise_level=0.4)
    scores, extra = score(latents, PROMPTS, ({}, {}, {}))
    assert extra == {}
    assert torch.allclose(scores, 0.1 * direct + 1, atol=1e-6)
    assert not torch.allclose(as_tuple_reward(reward, noise_level=0.2)(latents, PROMPTS)[0], direct)


def test_gradient(reward: LatentReward, latents: Tensor) -> None:
    latents.requires_grad_()
    scores = LatentScorer(reward).differentiable(latents, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), latents)
    assert gradient.abs().sum(dim=(1, 2, 3)).min() > 0
    assert not LatentScorer(reward)(latents, PROMPTS).requires_grad


def test_pixels_are_encoded_by_the_rewards_pipeline(reward: LatentReward) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scores, _ = as_tuple_reward(reward)(images, PROMPTS[:2], ())
    encoded = LatentScorer(reward).encode(images)
    assert encoded.shape == (2, 16, 8, 8)
    assert torch.equal(scores, LatentScorer(reward)(encoded, PROMPTS[:2]))


def test_pixels_without_an_autoencoder_are_refused(reward: LatentReward) -> None:
    def plain(latents: Tensor, prompts: Any, **options: Any) -> Tensor:
        return latents.flatten(1).mean(1)

    with pytest.raises(ValueError, match="these are pixels, and the reward has no autoencoder"):
        as_tuple_reward(plain)(torch.rand(2, 3, 8, 8), PROMPTS[:2])
    assert as_tuple_reward(plain)(torch.ones(2, 4, 8, 8), PROMPTS[:2])[0].tolist() == [1, 1]


def test_an_integer_seeds_a_single_row_as_a_list_does(reward: LatentReward, latents: Tensor) -> None:
    assert torch.equal(reward(latents[:1], "a cat", seed=5), reward(latents[:1], "a cat", seed=[5]))


def test_a_reward_says_what_it_is(reward: LatentReward) -> None:
    assert repr(reward) == (
        "LatentReward(family='sd3', backbone=None, 2 of 3 blocks, read after 1, 2; with a backbone of its own, "
        "torch.float32 on cpu, noise_level=0.4, inference)"
    )
