"""verl-omni in process: one sample per call, arguments by name, all calls on one event loop."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.integrations import verl_omni
from tests.integrations.conftest import PROMPTS, agree


def rows(latents: Tensor, **extra: Any) -> list[dict[str, Any]]:
    """What its reward manager passes for each sample, configuration keys apart."""
    return [
        {
            "solution_image": latents[i],
            "ground_truth": PROMPTS[i],
            "data_source": "prompts",
            "extra_info": {name: value[i] for name, value in extra.items()},
        }
        for i in range(len(latents))
    ]


async def score_all(samples: list[dict[str, Any]], **config: Any) -> list[dict[str, float]]:
    return await asyncio.gather(*(verl_omni.compute_score(**sample, **config) for sample in samples))


@pytest.fixture
def config(saved: dict[str, str]) -> dict[str, Any]:
    return {**saved, "device": "cpu", "max_wait_ms": 300.0}


def test_latent_outputs_with_prompts(config: dict[str, Any], latents: Tensor, direct: Tensor) -> None:
    results = asyncio.run(score_all(rows(latents), **config, score_scale=0.1, score_bias=1.0))
    agree("verl-omni in process", [result["raw_score"] for result in results], direct)
    assert [result["score"] for result in results] == pytest.approx((0.1 * direct + 1).tolist(), abs=1e-5)
    batcher, _ = verl_omni._batcher(*config_key(config))
    assert max(batcher.batch_sizes) == 3


def config_key(config: dict[str, Any]) -> tuple[Any, ...]:
    return (config["model_path"], config["base_model_path"], "cpu", "float32", 16, config["max_wait_ms"])


def test_pictures_with_latents_and_embeddings_beside_them(
    config: dict[str, Any], reward: LatentReward, latents: Tensor
) -> None:
    encoded, index = reward.encode_prompts(PROMPTS)
    embeds = encoded[index]
    assert embeds.pooled_prompt_embeds is not None
    samples = rows(
        latents,
        latents_clean=latents,
        prompt_embeds=embeds.prompt_embeds,
        pooled_prompt_embeds=embeds.pooled_prompt_embeds,
    )
    for sample in samples:
        sample["solution_image"] = torch.zeros(3, 64, 64, dtype=torch.uint8)
    results = asyncio.run(score_all(samples, **config, noise_seed=0, noise_level=0.4))
    expected = reward(latents, list(PROMPTS), seed=[0, 0, 0], noise_level=0.4)
    assert [result["score"] for result in results] == pytest.approx(expected.tolist(), abs=1e-5)


def test_newer_trees_have_named_artifacts(config: dict[str, Any], latents: Tensor, direct: Tensor) -> None:
    samples = rows(torch.zeros(3, 3, 64, 64, dtype=torch.uint8))
    for sample, latent in zip(samples, latents, strict=True):
        sample["extra_info"]["media_artifacts"] = {"image": None, "image_latent": SimpleNamespace(data=latent)}
    results = asyncio.run(score_all(samples, **config))
    assert [result["score"] for result in results] == pytest.approx(direct.tolist(), abs=1e-5)


def test_pictures_alone_are_refused(config: dict[str, Any], latents: Tensor) -> None:
    (sample,) = rows(latents[:1])
    sample["solution_image"] = torch.zeros(3, 64, 64)
    with pytest.raises(ValueError, match="set its output_type to 'latent' or 'both'"):
        asyncio.run(verl_omni.compute_score(**sample, **config))
    (sample,) = rows(latents[:1])
    sample["ground_truth"] = {"answer": 1}
    with pytest.raises(ValueError, match="neither raw_prompt nor ground_truth is a prompt"):
        asyncio.run(verl_omni.compute_score(**sample, **config))
