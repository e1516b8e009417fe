from __future__ import annotations

import functools
import inspect
import logging
import math

import pytest
import torch

from dina_reward.alignment.rewards import RewardSet, differentiable_score
from dina_reward.families import Conditioning
from dina_reward.reward_functions import RewardError, accepted_arguments, optional_reward, unique_names


LATENTS = torch.arange(3.0)[:, None, None, None].expand(3, 1, 2, 2)
ROWS = [{"prompt": "a", "length": 1}, {"prompt": "b", "length": 2}, {"prompt": "c", "length": 3}]
CONDITIONING = Conditioning(torch.zeros(3, 2, 4), torch.zeros(3, 4))
SETTINGS = {"noise_level": [0.4], "ensemble": "tokens", "num_noise_samples": 1}
SEEDS = [7, 7, 8]


def score(*functions, decode=None, **kwargs):
    return RewardSet(functions, SETTINGS, decode).score(LATENTS, ROWS, CONDITIONING, SEEDS, **kwargs)


def decode(latents):
    """Latents 0, 1, 2 become images of brightness 0, 0.5, 1 in bfloat16."""
    return (latents / 2).expand(-1, 3, -1, -1).bfloat16()


def brightness(images):
    return images.mean(dim=(1, 2, 3))


def mean(latents):
    return latents.mean(dim=(1, 2, 3))


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

    scores = score(plain, LatentRewardLike(), everything, brightness, decode=decode)
    assert scores.tolist() == [[0, 1, 0, 0], [1, 1, 1, 0.5], [2, 1, 2, 1]]
    assert scores.dtype == torch.float32
    assert seen["plain"] == (["a", "b", "c"], [1, 2, 3])
    assert seen["object"] == (["a", "b", "c"], None, [0.4], [7, 7, 8], False)
    assert {"latents", "prompts", "prompt_embeds", "pooled_prompt_embeds", "seed", "length"} <= seen["everything"]
    assert "images" not in seen["everything"]


def test_embeddings_go_to_functions_that_require_them():
    def from_embeddings(latents, prompt_embeds, pooled_prompt_embeds):
        pooled = 5.0 if pooled_prompt_embeds is None else pooled_prompt_embeds.sum(dim=1)
        return prompt_embeds.sum(dim=(1, 2)) + pooled

    assert score(from_embeddings).tolist() == [[0], [0], [0]]
    without_pooled = Conditioning(torch.zeros(3, 2, 4))
    assert RewardSet([from_embeddings], {}).score(LATENTS, ROWS, without_pooled, SEEDS).tolist() == [[5], [5], [5]]


def test_latents_are_decoded_once_and_only_for_pixel_rewards(caplog):
    calls = []

    def counting(latents):
        calls.append(latents)
        assert not torch.is_grad_enabled()
        return decode(latents)

    def sharpness(images, prompts):
        assert images.shape == (3, 3, 2, 2)
        assert images.dtype == torch.float32
        return [1.0, None, 3.0]

    assert not RewardSet([mean], SETTINGS, counting).needs_images
    score(mean, decode=counting)
    assert calls == []
    rewards = RewardSet([mean, brightness, sharpness], SETTINGS, counting)
    assert rewards.needs_images
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            scores = rewards.score(LATENTS, ROWS, CONDITIONING, SEEDS)
    assert len(calls) == 2  # one per batch, though two functions take images
    assert caplog.text.count("images in: brightness, sharpness") == 1
    assert scores[:, 1].tolist() == [0, 0.5, 1]
    given = torch.full((3, 3, 2, 2), 0.25)
    assert rewards.score(LATENTS, ROWS, CONDITIONING, SEEDS, images=given)[:, 1].tolist() == [0.25] * 3
    assert len(calls) == 2


def test_pixel_rewards_need_a_decoder_that_makes_images():
    with pytest.raises(ValueError, match="brightness takes images, but there is no decoder"):
        score(brightness)
    with pytest.raises(ValueError, match=r"shape \(3, 1, 2, 2\); expected \(3, 3, height, width\)"):
        score(brightness, decode=lambda latents: latents)
    with pytest.raises(ValueError, match=r"lie in \[-1, 1\]; expected \[0, 1\]"):
        score(brightness, decode=lambda latents: 2 * decode(latents) - 1)
    with pytest.raises(ValueError, match="NaN: run the VAE in float32"):
        score(brightness, decode=lambda latents: decode(latents) * math.nan)


def test_none_means_does_not_apply():
    def partial(latents):
        return [1.0, None, torch.tensor(3.0)]

    def never(latents):
        return None

    scores = score(partial, never, mean)
    assert torch.isnan(scores).tolist() == [[False, True, False], [True, True, False], [False, True, False]]
    assert scores[:, 2].tolist() == [0, 1, 2]
    assert scores[[0, 2], 0].tolist() == [1, 3]
    assert scores.dtype == torch.float32


def test_bad_functions_are_named_with_the_sample():
    def short(latents):
        return [1.0]

    def broken(latents):
        return [1.0, float("nan"), None]

    def infinite(latents):
        return torch.tensor([1.0, 2.0, float("inf")])

    def textual(latents):
        return ["good", "bad", "ugly"]

    def demanding(latents, image):
        return latents

    def raising(latents):
        raise KeyError("gone")

    with pytest.raises(RewardError, match=r"short returned shape \(1,\); expected one number per row, \(3,\)"):
        score(short)
    with pytest.raises(RewardError, match="broken returned nan for row 1 of 3.*row 1 prompt 'b' noise seed 7"):
        score(broken)
    with pytest.raises(
        RewardError, match="infinite returned inf for row 2 of 3.*row 2 prompt 'c' noise seed 8"
    ) as info:
        score(infinite)
    assert info.value.rows == [2]
    with pytest.raises(RewardError, match="textual returned list, which does not hold numbers"):
        score(textual)
    with pytest.raises(RewardError, match="raising raised KeyError.*row 0 prompt 'a' noise seed 7; row 1") as info:
        score(raising)
    assert isinstance(info.value.__cause__, KeyError)
    with pytest.raises(ValueError, match="demanding requires 'image', which is not available; it can take .*latents"):
        score(demanding)
    with pytest.raises(ValueError, match="no readable signature"):
        score(torch.sum)


def test_async_functions_are_refused():
    async def remote(latents):
        return [1.0, 1.0, 1.0]

    class Remote:
        async def __call__(self, latents):
            return [1.0, 1.0, 1.0]

    @functools.wraps(remote)
    def blocking(latents):
        return [1.0, 1.0, 1.0]

    for function in (remote, Remote(), optional_reward(remote)):
        with pytest.raises(ValueError, match=r"emote is an async function.*asyncio\.run"):
            score(function)
    with pytest.raises(RewardError, match="<lambda> returned coroutine.*must be awaited"):
        score(lambda latents: remote(latents))
    assert score(blocking).tolist() == [[1], [1], [1]]


def test_failures_of_optional_functions_are_counted(caplog):
    @optional_reward
    def judge(latents, length):
        """Doc."""
        if len(calls) == 1:
            raise OSError("no route to host")
        return [1.0, float("inf"), 3.0]

    calls = []
    rewards = RewardSet([mean, judge], SETTINGS)
    with caplog.at_level(logging.WARNING):
        first = rewards.score(LATENTS, ROWS, CONDITIONING, SEEDS)
        calls.append(1)
        second = rewards.score(LATENTS, ROWS, CONDITIONING, SEEDS)
    assert torch.isnan(first).tolist() == [[False, False], [False, True], [False, False]]
    assert first[[0, 2], 1].tolist() == [1, 3]
    assert torch.isnan(second).tolist() == [[False, True]] * 3
    assert rewards.failures == {"judge": 4}
    assert caplog.text.count("Optional reward: judge") == 1
    assert rewards.names == ["mean", "judge"]
    assert list(inspect.signature(judge).parameters) == ["latents", "length"]
    assert judge.__doc__ == "Doc."


def test_what_an_optional_function_requires_must_be_there():
    with pytest.raises(ValueError, match="requires 'image'"):
        score(optional_reward(lambda latents, image: [1.0] * 3))


def test_optional_objects_keep_their_name_and_signature():
    class Judge:
        def __call__(self, images, **kwargs):
            return None

    judge = optional_reward(Judge())
    assert unique_names([judge]) == ["Judge"]
    assert accepted_arguments(judge, {"images": 1, "x": 2}) == {"images": 1, "x": 2}
    assert RewardSet([judge], {}, decode).needs_images


def test_rewards_are_scored_without_gradient():
    weight = torch.ones(1, requires_grad=True)

    def differentiable(latents):
        return (latents * weight).mean(dim=(1, 2, 3))

    assert not score(differentiable).requires_grad


def available(latents):
    return RewardSet([], SETTINGS).arguments(latents, ROWS, CONDITIONING, SEEDS)


class LatentRewardLike:
    def __init__(self):
        self.options = None

    @torch.no_grad()
    def __call__(self, latents, prompts=None, **options):
        return latents.mean(dim=(1, 2, 3))

    def score(self, latents, prompts=None, **options):
        self.options = (prompts, options)
        scores = latents.mean(dim=(1, 2, 3)) * 3
        return type("RewardOutput", (), {"scores": scores})()


@pytest.mark.parametrize("wrap", [lambda function: function, optional_reward])
def test_differentiable_score_of_a_latent_reward(wrap):
    latents, reward = LATENTS.clone().requires_grad_(), LatentRewardLike()
    with torch.no_grad():
        scores = differentiable_score(wrap(reward), available(latents), 3)
    assert scores.tolist() == [0, 3, 6]
    scores.sum().backward()
    torch.testing.assert_close(latents.grad, torch.full_like(latents, 3 / 4))
    assert reward.options == (["a", "b", "c"], {**SETTINGS, "seed": SEEDS})


def test_differentiable_score_of_functions_and_of_images():
    latents = LATENTS.double().clone().requires_grad_()
    scores = differentiable_score(mean, available(latents), 3)
    assert scores.dtype == torch.float32
    scores[1].backward()
    assert latents.grad.sum(dim=(1, 2, 3)).tolist() == [0, 1, 0]
    latents = LATENTS.clone().requires_grad_()
    images = (latents / 2).expand(-1, 3, -1, -1)
    differentiable_score(brightness, available(latents), 3, images=images).sum().backward()
    torch.testing.assert_close(latents.grad, torch.full_like(latents, 1 / 8))


def test_differentiable_score_refuses_what_gives_no_gradient():
    latents = LATENTS.clone().requires_grad_()
    with pytest.raises(ValueError, match="brightness takes images; .* differentiable decoder"):
        differentiable_score(brightness, available(latents), 3)
    with pytest.raises(ValueError, match="mean returned scores without a gradient"):
        differentiable_score(torch.no_grad()(mean), available(latents), 3)
    with pytest.raises(ValueError, match="without a gradient"):
        differentiable_score(lambda latents: None, available(latents), 3)
    with pytest.raises(RewardError, match="returned nan for row 0 of 3.*prompt 'a'"):
        differentiable_score(lambda latents: latents.mean(dim=(1, 2, 3)) / 0, available(latents), 3)


def test_repeated_names_are_numbered():
    def reward(latents):
        return latents

    assert unique_names([reward, len, reward]) == ["reward", "len", "reward_2"]
