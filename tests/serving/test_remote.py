"""A remote reward gives the scores of the reward itself, to the last bit, whatever it is asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward, RemoteReward
from dina_reward.serving import RemoteRewardError
from dina_reward.serving.requests import OPTIONS_KEY
from dina_reward.serving.settings import TOKEN_VARIABLE
from tests.serving.conftest import PROMPTS, Running, running


@pytest.fixture
def remote(server: Running) -> Iterator[RemoteReward]:
    made = RemoteReward(server.url, batch_size=8)
    yield made
    made.close()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


NOISE = torch.randn(2, 2, 6, 8, 8, 8, generator=torch.Generator().manual_seed(9))
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"seed": 3},
    "one level": {"seed": 3, "noise_level": 0.2, "normalize": True},
    "seed per row": {"seed": [5, 4, 3, 2, 1, 2**64 - 1]},
    "ensemble": {"seed": 3, "noise_level": [0.2, 0.5]},
    "means over draws": {"seed": 3, "noise_level": (0.2, 0.5), "ensemble": "mean", "num_noise_samples": 3},
    "draws": {"seed": 3, "num_noise_samples": 2, "normalize": True},
    "levels apart": {"seed": 3, "noise_level": [0.2, 0.5], "share_noise_across_levels": False},
    "one level apart": {"seed": 3, "noise_level": [0.2], "share_noise_across_levels": False},
    "shared noise": {"seed": 3, "share_noise": True},
    "given noise": {"noise": NOISE[0], "num_noise_samples": 2},
    "one row of noise": {"noise": NOISE[0, 0, :1]},
    "levels apart, shared": {"seed": 3, "noise_level": [0.2], "share_noise_across_levels": False, "share_noise": True},
    "noise of levels": {
        "noise": NOISE,
        "num_noise_samples": 2,
        "noise_level": [0.2, 0.5],
        "share_noise_across_levels": False,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_scores_are_those_of_the_reward_itself(
    name: str, reward: LatentReward, remote: RemoteReward, latents: Tensor, prompts: list[str]
) -> None:
    here = reward.score(latents, prompts, **OPTIONS[name])
    there = remote.score(latents, prompts, **OPTIONS[name])
    for field in ("scores", "noise_levels", "timesteps"):
        assert torch.equal(getattr(here, field), getattr(there, field)), field
    torch.testing.assert_close(here.level_scores, there.level_scores, rtol=0, atol=5e-6)
    assert (here.noise_std is None) == (there.noise_std is None)
    if here.noise_std is not None:
        torch.testing.assert_close(here.noise_std, there.noise_std, rtol=0, atol=5e-6)


def test_a_generator_draws_here(
    reward: LatentReward, remote: RemoteReward, latents: Tensor, prompts: list[str]
) -> None:
    here = reward(latents, prompts, generator=generator())
    assert torch.equal(here, remote(latents, prompts, generator=generator()))


@pytest.mark.parametrize("points", [{"noise_level": 0.5}, {"timesteps": [100.0, 200, 300, 400, 500, 600]}])
def test_noisy_states(
    points: dict[str, Any], reward: LatentReward, remote: RemoteReward, latents: Tensor, prompts: list[str]
) -> None:
    here = reward.score_noisy(latents, prompts, normalize=True, **points)
    assert torch.equal(here, remote.score_noisy(latents, prompts, normalize=True, **points))


def test_preferences(reward: LatentReward, remote: RemoteReward, latents: Tensor) -> None:
    sides = (latents[:3], latents[3:], PROMPTS[0])
    assert torch.equal(reward.preference(*sides, seed=1), remote.preference(*sides, seed=1))
    assert torch.equal(
        reward.preference(*sides, seed=1, noise_level=[0.2, 0.6]),
        remote.preference(*sides, seed=1, noise_level=[0.2, 0.6]),
    )


@pytest.mark.parametrize("rows", [1, 6])
def test_embeddings(
    rows: int, reward: LatentReward, remote: RemoteReward, latents: Tensor, prompts: list[str]
) -> None:
    encoded, index = reward.encode_prompts(prompts[:rows])
    encoded = encoded[index]
    given = {"prompt_embeds": encoded.prompt_embeds, "pooled_prompt_embeds": encoded.pooled_prompt_embeds}
    here = reward(latents, seed=3, **given)
    torch.testing.assert_close(remote(latents, seed=3, **given), here, rtol=0, atol=1e-5)
    assert torch.equal(remote(latents, seed=3, **given), reward(latents, prompts[:rows] * (6 // rows), seed=3))


def test_tensors_may_share_memory(reward: LatentReward, remote: RemoteReward, latents: Tensor) -> None:
    assert torch.equal(reward(latents, PROMPTS[0], noise=latents), remote(latents, PROMPTS[0], noise=latents))


def test_dtypes_other_than_float32(
    reward: LatentReward, remote: RemoteReward, latents: Tensor, prompts: list[str]
) -> None:
    half = latents.bfloat16()
    assert torch.equal(reward(half, prompts, seed=3), remote(half, prompts, seed=3))
    with torch.inference_mode():
        assert torch.equal(reward(half, prompts, seed=3), remote(half, prompts, seed=3))


def test_each_prompt_travels_once_and_rows_are_split(
    reward: LatentReward, remote: RemoteReward, latents: Tensor, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load

    bodies: list[bytes] = []
    send = remote._transport.send
    monkeypatch.setattr(remote._transport, "send", lambda *args: (bodies.extend(args[2:3]), send(*args))[1])
    encoded, index = reward.encode_prompts(prompts)
    encoded = encoded[index]
    scores = remote(
        latents,
        prompt_embeds=encoded.prompt_embeds,
        pooled_prompt_embeds=encoded.pooled_prompt_embeds,
        seed=3,
        batch_size=4,
    )
    tensors = [load(body) for body in bodies]
    assert [len(part["latents"]) for part in tensors] == [4, 2]
    assert [len(part["prompt_embeds"]) for part in tensors] == [2, 1]
    assert [part["prompt_index"].tolist() for part in tensors] == [[0, 0, 0, 1], [0, 0]]
    torch.testing.assert_close(scores, reward(latents, prompts, seed=3), rtol=0, atol=1e-5)
    bodies.clear()
    remote(latents, prompts, seed=3)
    assert bodies[0].count(PROMPTS[0].encode()) == 1
    assert OPTIONS_KEY.encode() in bodies[0]


def test_signatures_are_those_of_the_reward() -> None:
    for name in ("score", "__call__", "score_noisy", "preference"):
        remote, here = (inspect.signature(getattr(each, name)) for each in (RemoteReward, LatentReward))
        conservative = {"kappa", "spread"}  # are not part of the protocol
        expected = {key: value.default for key, value in here.parameters.items() if key not in conservative}
        assert {key: value.default for key, value in remote.parameters.items()} == expected


def test_what_it_says_of_itself(server: Running, remote: RemoteReward, reward: LatentReward) -> None:
    from dina_reward.serving.card import weights_digest

    assert repr(remote) == f"RemoteReward({server.url})"
    assert remote.config == reward.config
    assert remote.weights_digest() == weights_digest(reward)
    assert remote.__name__ == reward.__name__
    assert remote.info["takes"]["latents"] == {"channels": 8, "multiple": 2, "frames": False}


def test_a_refusal_says_what_to_do_and_is_not_tried_again(
    server: Running, remote: RemoteReward, latents: Tensor
) -> None:
    before = server.metric("dina_reward_requests_total", path="/v2/score")
    with pytest.raises(RemoteRewardError, match=r"422: too_many_draws: given 65 .*at most 64"):
        remote(latents, PROMPTS[0], num_noise_samples=65)
    assert server.metric("dina_reward_requests_total", path="/v2/score") == before + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prompts. or .prompt_embeds"),
        ({"prompts": PROMPTS}, "2 prompts for 6 latents"),
        ({"prompts": PROMPTS[0], "pooled_prompt_embeds": torch.zeros(1, 8)}, "belong to prompt_embeds"),
        ({"prompts": PROMPTS[0], "seed": 1, "noise": torch.zeros(6, 8, 8, 8)}, "only one of `seed`"),
        ({"prompts": PROMPTS[0], "seed": [1, 2], "share_noise": True}, "single integer seed"),
        ({"prompts": PROMPTS[0], "normalize": "false"}, "normalize must be True or False"),
        ({"prompts": PROMPTS[0], "noise": torch.zeros(6, 4, 8, 8)}, "4 channels"),
        ({"prompts": PROMPTS[0], "batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_calls_are_errors_here(  # before anything is sent
    remote: RemoteReward, latents: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        remote(latents, **options)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://host/other"])
def test_wrong_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="address"):
        RemoteReward(url)


def test_the_token_is_given_or_in_the_environment(
    reward: LatentReward, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    expected = reward(latents, PROMPTS[0], seed=3)
    with running(reward, token="s3cret") as server:
        assert torch.equal(RemoteReward(server.url, token="s3cret")(latents, PROMPTS[0], seed=3), expected)
        with pytest.raises(RemoteRewardError, match="401: not_authorised"):
            RemoteReward(server.url)(latents, PROMPTS[0], seed=3)
        monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
        assert torch.equal(RemoteReward(server.url)(latents, PROMPTS[0], seed=3), expected)


def test_two_servers_share_the_rows(
    server: Running, reward: LatentReward, latents: Tensor, prompts: list[str]
) -> None:
    with running(reward) as second:
        remote = RemoteReward(f"{server.url}, {second.url}/v1/score", batch_size=1)
        scores = remote(latents, prompts, seed=3)
        rows = second.metric("dina_reward_rows_scored_total")
    torch.testing.assert_close(scores, reward(latents, prompts, seed=3), rtol=0, atol=1e-5)
    assert 0 < rows < len(latents)
    # The second server has gone; what it would have scored goes to the first.
    torch.testing.assert_close(remote(latents, prompts, seed=3), scores, rtol=0, atol=1e-5)


def test_servers_with_different_rewards_are_refused(server: Running, reward: LatentReward, latents: Tensor) -> None:
    with running(reward) as second:
        second.service.info = {**second.service.info, "weights": "other"}
        remote = RemoteReward([server.url, second.url], batch_size=1)
        with pytest.raises(RemoteRewardError, match="different rewards"):
            remote(latents, PROMPTS[0], seed=3)
