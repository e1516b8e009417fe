"""Single samples scored in batches."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.integrations import MicroBatcher, prompt_seeds
from tests.integrations.conftest import PROMPTS


def test_threads_are_scored_together_as_they_would_be_directly(
    reward: LatentReward, latents: Tensor, direct: Tensor
) -> None:
    batcher = MicroBatcher(reward, max_batch_size=8, max_wait_ms=500)
    scores: dict[int, float] = {}

    def work(row: int) -> None:
        i = row % 3
        scores[row] = batcher.score({"latents": latents[i : i + 1]}, prompt=PROMPTS[i], seed=prompt_seeds(PROMPTS)[i])

    threads = [threading.Thread(target=work, args=(row,)) for row in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [scores[row] for row in range(16)] == pytest.approx([float(direct[row % 3]) for row in range(16)], abs=1e-5)
    assert sum(batcher.batch_sizes) == 16
    assert max(batcher.batch_sizes) == 8


def test_unlike_rows_are_apart_and_errors_reach_their_own_caller() -> None:
    def plain(latents: Tensor, prompts: Any, **options: Any) -> Tensor:
        if latents.shape[-1] == 5:
            raise ValueError("five")
        return latents.flatten(1).mean(1)

    async def run() -> list[Any]:
        batcher = MicroBatcher(plain, max_wait_ms=200)
        rows = [batcher.score_async({"latents": torch.ones(1, 2, side)}, prompt="a", seed=0) for side in (4, 5, 4)]
        result = await asyncio.gather(*rows, return_exceptions=True)
        assert sorted(batcher.batch_sizes) == [1, 2]
        return result

    first, second, third = asyncio.run(run())
    assert (first, third) == (1.0, 1.0)
    assert str(second) == "five"


def test_wrong_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one row each, got \{'latents': \(2, 3\)\}"):
        MicroBatcher(lambda *a, **k: torch.zeros(1)).submit({"latents": torch.zeros(2, 3)}, seed=0)
    with pytest.raises(ValueError, match="max_batch_size must be an integer of at least 1, got 0"):
        MicroBatcher(lambda *a, **k: torch.zeros(1), max_batch_size=0)
