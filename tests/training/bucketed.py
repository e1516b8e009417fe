"""Preferences in two latent shapes, as a cache of latents has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dina_reward.data import LatentPreferenceDataset
from dina_reward.modeling.prompt_encoding import PromptEncoder
from tests.training.tiny_reward import separable_pairs


class BucketedPairs:
    """Pairs whose even rows are square and whose odd rows are cut to half the height."""

    def __init__(self, count: int = 40, seed: int = 0) -> None:
        self.pairs: LatentPreferenceDataset = separable_pairs(count, seed)
        self.bucket_of = np.arange(count, dtype=np.int16) % 2
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        row = self.pairs[index]
        height = 4 if self.bucket_of[index] else 8
        return {**row, **{side: row[side][:, :height] for side in ("chosen", "rejected")}}


def embedded_rows(pipeline: Any, reward: Any, count: int = 16) -> list[dict[str, Any]]:
    """Pairs with the embeddings of their prompts, as a cache stores them."""
    pairs, rows = separable_pairs(count), []
    encoder = PromptEncoder(reward.family, pipeline, max_sequence_length=8)
    for index in range(count):
        row = pairs[index]
        conditioning, _ = encoder([row["prompt"]])
        assert conditioning.pooled_prompt_embeds is not None
        assert torch.isfinite(conditioning.prompt_embeds).all()
        rows.append(
            {
                **row,
                "prompt_embeds": conditioning.prompt_embeds[0],
                "pooled_prompt_embeds": conditioning.pooled_prompt_embeds[0],
            }
        )
    return rows
