"""A served score is the direct one: to the last bit in an equal batch, within rounding in any other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.serving.requests import ScoreRequest
from dina_reward.serving.scorer import Scores
from tests.serving.conftest import PROMPTS, Running
from tests.serving.raw import App, post, read_v1, v1_body
from tests.serving.test_app import in_app


ROWS = 8
LEVELS = (0.05, 0.2, 0.4, 0.55)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(ROWS, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def as_one_batch(reward: LatentReward, bodies: Sequence[bytes]) -> Tensor:
    """Scores of requests of version 1 that are scored in one pass, in their order."""
    sizes: list[int] = []
    taken, gate = threading.Event(), threading.Event()

    async def work(app: App) -> list[float]:
        batcher = app.app.state.service.batcher
        score = batcher._score

        def gated(requests: Sequence[ScoreRequest]) -> list[Scores]:
            taken.set()
            gate.wait(30)
            sizes.append(len(requests))
            return score(requests)

        batcher._score = gated
        first = asyncio.create_task(app(chunks=[bodies[0]]))  # is taken at once, alone
        while not taken.is_set():
            await asyncio.sleep(0.005)
        rest = []
        for waiting, body in enumerate(bodies, start=1):
            rest.append(asyncio.create_task(app(chunks=[body])))
            while batcher._queued < waiting:
                await asyncio.sleep(0.001)
        gate.set()
        await first
        return [read_v1(*reply) for reply in await asyncio.gather(*rest)]

    scores = in_app(reward, work)
    assert sizes == [1, len(bodies)]
    return torch.tensor(scores)


def test_requests_in_one_batch_have_the_bits_of_a_direct_batch(reward: LatentReward, latents: Tensor) -> None:
    prompts = [PROMPTS[row % 2] for row in range(ROWS)]
    bodies = [v1_body(reward, latents[row], prompts[row], u=0.4, seed=row) for row in range(ROWS)]
    expected = reward(latents, prompts, noise_level=0.4, seed=list(range(ROWS)))
    assert torch.equal(as_one_batch(reward, bodies), expected)


def test_rows_of_one_request_have_the_bits_of_a_direct_batch(
    server: Running, reward: LatentReward, latents: Tensor
) -> None:
    encoded, _ = reward.encode_prompts(PROMPTS[:1])
    tensors = {
        "latents": latents,
        "prompt_embeds": encoded.prompt_embeds.contiguous(),
        "pooled_prompt_embeds": encoded.pooled_prompt_embeds.contiguous(),
        "u": torch.full((ROWS,), 0.3),
        "seeds": torch.arange(ROWS),
    }
    reply: Any = post(server.url, save(tensors)).json()
    expected = reward(latents, PROMPTS[0], noise_level=0.3, seed=list(range(ROWS)))
    assert torch.equal(torch.tensor(reply["raw_scores"]), expected)


def test_a_mixed_batch_differs_from_single_rows_by_rounding_alone(reward: LatentReward, latents: Tensor) -> None:
    """Prompts, levels and seeds differ. Scores are near 20, where float32 has steps of 1.9e-6."""
    bodies, alone = [], []
    for row in range(ROWS):
        prompt, level = PROMPTS[row % 2], LEVELS[row % len(LEVELS)]
        bodies.append(v1_body(reward, latents[row], prompt, u=level, seed=row))
        alone.append(reward(latents[row : row + 1], prompt, noise_level=level, seed=[row]))
    torch.testing.assert_close(as_one_batch(reward, bodies), torch.cat(alone), rtol=1e-6, atol=0)
