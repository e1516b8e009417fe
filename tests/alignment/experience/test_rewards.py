from __future__ import annotations

import functools
import inspect
import logging
import math

import pytest
import torch

from dina_reward import LatentReward
from dina_reward.alignment.experience.rewards import RewardSet, check_columns, differentiable_score
from dina_reward.families import Conditioning
from dina_reward.reward_functions import (
    RewardError,
    accepted_arguments,
    optional_reward,
    reward_list,
    unique_names,
)
from tests.test_reward import make_reward


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
    with pytest.raises(RewardError, match="textual returned list, which does not hold one number per row"):
        score(textual)
    with pytest.raises(RewardError, match="raising raised KeyError.*row 0 prompt 'a' noise seed 7; row 1") as info:
        score(raising)
    assert isinstance(info.value.__cause__, KeyError)
    with pytest.raises(ValueError, match="demanding requires 'image', which is not available; it can take .*latents"):
        score(demanding)
    with pytest.raises(ValueError, match="no readable signature"):
        score(torch.sum)


def test_what_is_not_one_number_per_row_is_explained():
    def with_info(latents):
        return mean(latents), {"note": 1}

    def with_list(latents):
        return [1.0, 2.0, 3.0], [1, 2, 3]

    def large(latents):
        return 1e9 + mean(latents).double()

    with pytest.raises(
        RewardError, match=r"with_info returned tuple.*the scores alone, not a tuple of \(Tensor, dict\)"
    ):
        score(with_info)
    with pytest.raises(RewardError, match=r"with_list returned tuple.*not a tuple of \(list, list\)"):
        score(with_list)
    with pytest.raises(RewardError, match="differ by 2 but are all 1e\\+09 in float32; subtract a constant"):
        score(large)
    assert score(lambda latents: (1.0, 2.0, 3.0)).tolist() == [[1], [2], [3]]
    assert score(lambda latents: torch.full((3,), 1e9, dtype=torch.float64)).tolist() == [[1e9]] * 3


@pytest.mark.parametrize("given", ["pickscore", {"pickscore": mean}, None, [mean, "pickscore"], [LatentReward], 3])
def test_what_cannot_be_called_is_refused(given):
    with pytest.raises(ValueError, match="reward_funcs must be one function or a list of functions, got"):
        reward_list(given, "reward_funcs")
    assert reward_list(mean, "x") == [mean]
    assert reward_list((mean, mean), "x") == [mean, mean]


def test_functions_cannot_change_what_others_see():
    meta = {"k": 1}
    rows = [{"prompt": "a", "meta": meta}] * 3  # as members of a group have it

    def destructive(latents, images, meta, prompts):
        prompts.clear()
        images.mul_(255)
        return latents.mul_(0).mean(dim=(1, 2, 3)) + torch.tensor([row.pop("k", 0.0) for row in meta])

    rewards = RewardSet([destructive, mean, brightness, lambda meta, prompts: [row["k"] for row in meta]], {}, decode)
    for _ in range(2):
        scores = rewards.score(LATENTS.clone(), rows, CONDITIONING, SEEDS)
        assert scores.tolist() == [[1, 0, 0, 1], [1, 1, 0.5, 1], [1, 2, 1, 1]]
    latents = LATENTS.clone().requires_grad_()
    available = {"latents": latents, "prompts": ["a"] * 3}
    differentiable_score(lambda latents: latents.mul_(2).mean(dim=(1, 2, 3)), available, 3).sum().backward()
    assert latents.detach().equal(LATENTS)
    assert float(latents.grad.sum()) == pytest.approx(6)


class Brightness(torch.nn.Module):
    def forward(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class Mean(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.score = torch.nn.Linear(1, 1)  # a layer, not a method

    def forward(self, latents, scale: float = 1.0):
        return latents.mean(dim=(1, 2, 3)) * scale


@torch.jit.script
def scripted_mean(latents):
    return latents.mean(dim=(1, 2, 3))


def test_modules_are_asked_by_the_signature_of_forward():
    assert score(Brightness(), decode=decode).tolist() == [[0], [0.5], [1]]
    compiled = torch.compile(Mean(), backend="eager")
    wrapped = [Mean(), torch.jit.script(Mean()), compiled, torch.nn.DataParallel(Mean()), scripted_mean]
    for function in [*wrapped, functools.partial(Mean(), scale=1.0), optional_reward(Mean())]:
        assert list(accepted_arguments(function, {"latents": 1, "seed": 2})) == ["latents"]
        assert score(function).tolist() == [[0], [1], [2]]
    assert unique_names([torch.jit.script(Mean())]) == ["Mean"]
    latents = LATENTS.clone().requires_grad_()
    assert differentiable_score(Mean(), {"latents": latents}, 3).tolist() == [0, 1, 2]


def test_columns_that_some_rows_lack_are_none_there():
    rows = [{"prompt": "a"}, {"prompt": "b", "length": 2}, {"prompt": "c", "tag": 3}]

    def judge(length, tag):
        return [(a or 0) + (b or 0) for a, b in zip(length, tag, strict=True)]

    for order in (rows, rows[::-1]):
        scores = RewardSet([judge], {}).score(LATENTS, order, CONDITIONING, SEEDS)
        assert scores.flatten().sort().values.tolist() == [0, 2, 3]


@pytest.mark.parametrize("column", ["seed", "noise_level", "latents", "prompts", "images"])
def test_columns_that_look_like_settings_are_refused(column):
    rows = [{**row, column: 1} for row in ROWS]
    with pytest.raises(ValueError, match=f"column '{column}', which is also an argument that every reward"):
        RewardSet([mean], SETTINGS).score(LATENTS, rows, CONDITIONING, SEEDS)


def test_columns_that_are_options_of_a_latent_reward_are_refused(sd3_pipeline):
    reward = make_reward(sd3_pipeline)
    check_columns(["prompt", "normalize"], [mean])
    for column in ("normalize", "noise", "generator", "batch_size"):
        with pytest.raises(ValueError, match=f"column '{column}', which is also an option of latent_reward"):
            check_columns(["prompt", column], [mean, optional_reward(reward)])


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
