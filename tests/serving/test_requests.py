"""Bodies of version 2: what is refused and why, and which requests may be scored together."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dina_reward import LatentReward
from dina_reward.serving import RequestError, ServingConfig
from dina_reward.serving.requests import ScoreRequest, check_tensors, content_name, read_request
from dina_reward.serving.wire import PREFIX, header_length, parse_header
from tests.serving.conftest import PROMPTS


LIMITS = ServingConfig()
LATENTS = torch.zeros(2, 8, 8, 8)
TWO = torch.tensor([0.2, 0.4])


def read(reward: LatentReward, tensors: dict[str, torch.Tensor], **options: Any) -> ScoreRequest:
    # Copies, since tensors that share memory are not saved.
    body = save(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, {"options": json.dumps(options)}
    )
    length = header_length(body, 1 << 20)
    header = parse_header(body[PREFIX : PREFIX + length])
    check_tensors(header, 2, LIMITS)
    return read_request(header, bytearray(body[PREFIX + length :]), reward, LIMITS)


P = {"prompts": PROMPTS}
WRONG: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no latents": ({"u": TWO}, P, "missing_tensors"),
    "clean and noisy": ({"latents": LATENTS, "noisy_latents": LATENTS}, P, "missing_tensors"),
    "unknown option": ({"latents": LATENTS}, {**P, "level": 0.4}, "invalid_options"),
    "level above 1": ({"latents": LATENTS}, {**P, "noise_level": 1.4}, "invalid_options"),
    "no level": ({"latents": LATENTS}, {**P, "noise_level": []}, "invalid_options"),
    "text for a truth": ({"latents": LATENTS}, {**P, "normalize": "false"}, "invalid_options"),
    "unknown ensemble": ({"latents": LATENTS}, {**P, "ensemble": "sum"}, "invalid_options"),
    "no draws": ({"latents": LATENTS}, {**P, "num_noise_samples": 0}, "invalid_options"),
    "many draws": ({"latents": LATENTS}, {**P, "noise_level": [0.1] * 13, "num_noise_samples": 5}, "too_many_draws"),
    "another aspect": ({"latents": LATENTS}, {**P, "height": 64, "width": 32}, "invalid_latents"),
    "no prompts": ({"latents": LATENTS}, {}, "no_prompts"),
    "pooled alone": ({"latents": LATENTS, "pooled_prompt_embeds": torch.zeros(1, 64)}, P, "no_prompts"),
    "three prompts": ({"latents": LATENTS}, {"prompts": [*PROMPTS, "a"]}, "wrong_rows"),
    "prompts of numbers": ({"latents": LATENTS}, {"prompts": [1, 2]}, "invalid_prompts"),
    "prompt with NUL": ({"latents": LATENTS}, {"prompts": "\0embedded x"}, "invalid_prompts"),
    "long prompt": ({"latents": LATENTS}, {"prompts": "a" * 20_001}, "invalid_prompts"),
    "index beyond": ({"latents": LATENTS, "prompt_index": torch.tensor([0, 2])}, P, "invalid_prompt_index"),
    "negative index": ({"latents": LATENTS, "prompt_index": torch.tensor([0, -1])}, P, "invalid_prompt_index"),
    "noisy without level": ({"noisy_latents": LATENTS}, P, "invalid_levels"),
    "noisy with seeds": ({"noisy_latents": LATENTS, "u": TWO, "seeds": torch.arange(2)}, P, "invalid_levels"),
    "noisy with both": ({"noisy_latents": LATENTS, "u": TWO, "timesteps": TWO}, P, "invalid_levels"),
    "timesteps of clean": ({"latents": LATENTS, "timesteps": TWO}, P, "invalid_levels"),
    "timesteps beyond": ({"noisy_latents": LATENTS, "timesteps": 1e5 * TWO}, P, "invalid_levels"),
    "two kinds of level": ({"latents": LATENTS, "u": TWO}, {**P, "noise_level": 0.4}, "invalid_levels"),
    "draws with u": ({"latents": LATENTS, "u": TWO}, {**P, "num_noise_samples": 2}, "invalid_options"),
    "noise and seeds": (
        {"latents": LATENTS, "noise": LATENTS[:, None], "seeds": torch.arange(2)},
        P,
        "invalid_noise",
    ),
    "noise of other shape": ({"latents": LATENTS, "noise": LATENTS[:, None, :4]}, P, "invalid_noise"),
    "noise without draws": ({"latents": LATENTS, "noise": LATENTS}, P, "invalid_noise"),
    "noise of NaN": ({"latents": LATENTS, "noise": torch.full((2, 1, 8, 8, 8), torch.nan)}, P, "not_finite"),
    "mask of floats": ({"latents": LATENTS, "prompt_embeds_mask": torch.zeros(2, 6)}, P, "wrong_dtype"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str, reward: LatentReward) -> None:
    tensors, options, code = WRONG[name]
    with pytest.raises(RequestError) as caught:
        read(reward, tensors, **options)
    assert (caught.value.status, caught.value.code) == (422, code)
    assert caught.value.given
    assert caught.value.expected
    assert len(str(caught.value)) < 1000


def test_options_that_are_no_object(reward: LatentReward) -> None:
    for text in ("[]", "1", "{", '"a"'):
        body = save({"latents": LATENTS}, {"options": text})
        length = header_length(body, 1 << 20)
        header = parse_header(body[PREFIX : PREFIX + length])
        with pytest.raises(RequestError, match="invalid_options"):
            read_request(header, bytearray(body[PREFIX + length :]), reward, LIMITS)


def test_which_requests_are_scored_together(reward: LatentReward) -> None:
    seeded = {"latents": LATENTS, "seeds": torch.arange(2)}
    plain = read(reward, seeded, **P)
    same = [
        read(reward, {**seeded, "u": TWO}, **P),
        read(reward, seeded, **P, noise_level=0.7),
        read(reward, seeded, **P, noise_level=[0.7]),
        read(reward, {"latents": LATENTS[:1]}, prompts="another"),
    ]
    assert all(each.key == plain.key for each in same)
    other = [
        read(reward, {"latents": torch.zeros(2, 8, 4, 8)}, **P),
        read(reward, {"latents": LATENTS.half()}, **P),
        read(reward, seeded, **P, normalize=True),
        read(reward, seeded, **P, noise_level=[0.2, 0.4]),
        read(reward, seeded, **P, noise_level=[0.2, 0.5]),
        read(reward, seeded, **P, num_noise_samples=2),
        read(reward, {"noisy_latents": LATENTS, "u": TWO}, **P),
        read(reward, {"noisy_latents": LATENTS, "timesteps": 1000 * TWO}, **P),
        read(reward, {"latents": LATENTS, "noise": LATENTS[:, None]}, **P),
    ]
    assert len({plain.key, *(each.key for each in other)}) == 1 + len(other)


def test_rows_count_with_their_levels_and_draws(reward: LatentReward) -> None:
    assert read(reward, {"latents": LATENTS}, **P).draws == 1
    assert read(reward, {"latents": LATENTS}, **P, noise_level=[0.2, 0.4], num_noise_samples=3).draws == 6


def test_content_has_one_name(reward: LatentReward) -> None:
    first, _ = reward.encode_prompts(PROMPTS[:1])
    again = first.map(lambda tensor: tensor.clone())
    assert content_name(first) == content_name(again)
    again.prompt_embeds[0, 0, 0] += 1e-6
    assert content_name(first) != content_name(again)
    assert content_name(first) != content_name(first.to(torch.bfloat16))
