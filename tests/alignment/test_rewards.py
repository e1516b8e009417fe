from __future__ import annotations

import pytest
import torch

from dina_reward.alignment.rewards import RewardSet, unique_names
from dina_reward.families.base import Conditioning


LATENTS = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
ROWS = [{"prompt": "a", "length": 1}, {"prompt": "b", "length": 2}, {"prompt": "c", "length": 3}]
CONDITIONING = Conditioning(torch.zeros(3, 2, 4), torch.zeros(3, 4))
SETTINGS = {"noise_level": [0.4], "ensemble": "tokens", "num_noise_samples": 1}


def score(*functions):
    return RewardSet(functions, SETTINGS).score(LATENTS, ROWS, CONDITIONING, [7, 7, 8])


def test_functions_get_what_they_name():
    seen = {}

    def plain(latents, prompts, length):
        seen["plain"] = (prompts, length)
        return latents.mean(dim=(1, 2, 3))

    class LatentRewardLike:
        def __call__(self, latents, prompts=None, *, prompt_embeds=None, noise_level=None, seed=None, normalize=False):
            seen["object"] = (prompts, prompt_embeds, noise_level, seed, normalize)
            return torch.ones(3)

    def everything(**kwargs):
        seen["everything"] = set(kwargs)
        return [0.0, 1.0, 2.0]

    scores = score(plain, LatentRewardLike(), everything)
    assert scores.tolist() == [[0, 1, 0], [1, 1, 1], [2, 1, 2]]
    assert scores.dtype == torch.float32
    assert seen["plain"] == (["a", "b", "c"], [1, 2, 3])
    assert seen["object"] == (["a", "b", "c"], None, [0.4], [7, 7, 8], False)
    assert {"latents", "prompts", "prompt_embeds", "pooled_prompt_embeds", "seed", "length"} <= seen["everything"]


def test_embeddings_go_to_functions_that_require_them():
    def from_embeddings(latents, prompt_embeds, pooled_prompt_embeds):
        return prompt_embeds.sum(dim=(1, 2)) + pooled_prompt_embeds.sum(dim=1)

    assert score(from_embeddings).tolist() == [[0], [0], [0]]


def test_bad_functions_are_named():
    def short(latents):
        return [1.0]

    def broken(latents):
        return [1.0, float("nan"), 2.0]

    def textual(latents):
        return ["good", "bad", "ugly"]

    def demanding(latents, image):
        return latents

    with pytest.raises(ValueError, match=r"short returned shape \(1,\); expected one number per row, \(3,\)"):
        score(short)
    with pytest.raises(ValueError, match="broken returned nan for row 1 of 3"):
        score(broken)
    with pytest.raises(ValueError, match="textual returned list, which does not hold numbers"):
        score(textual)
    with pytest.raises(ValueError, match="demanding requires 'image', which is not available; it can take .*latents"):
        score(demanding)


def test_rewards_are_scored_without_gradient():
    weight = torch.ones(1, requires_grad=True)

    def differentiable(latents):
        return (latents * weight).mean(dim=(1, 2, 3))

    assert not score(differentiable).requires_grad


def test_repeated_names_are_numbered():
    def reward(latents):
        return latents

    assert unique_names([reward, len, reward]) == ["reward", "len", "reward_2"]
