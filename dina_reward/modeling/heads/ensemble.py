"""Several heads on one backbone pass, which agree where they were trained and may not elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward.families import TapFeatures


class EnsembleHead(nn.Module):
    """Heads of one shape and different initial weights; its score is their mean (deep ensembles, arXiv 1612.01474).

    Args:
        build: makes a head.
        num_members: how many.
    """

    width: int
    """Channels inside each of them."""

    def __init__(self, build: Callable[[], Any], num_members: int) -> None:
        super().__init__()
        heads = [build() for _ in range(num_members)]
        self.width = heads[0].width
        self.heads = nn.ModuleList(heads)

    def member_scores(self, features: TapFeatures, num_levels: int = 1) -> Tensor:
        """Scores of each head, shape ``(members, rows / num_levels)``, float32."""
        return torch.stack([head(features, num_levels) for head in self.heads])

    def forward(self, features: TapFeatures, num_levels: int = 1) -> Tensor:
        """Mean score, shape ``(rows / num_levels,)``, float32."""
        return self.member_scores(features, num_levels).mean(dim=0)


def member_weights(latents: Tensor, num_members: int) -> Tensor:
    """Which pairs train which member, shape ``(members, pairs)``: each leaves out about a quarter, always the same.

    Whether a pair counts depends on the bits of its first latent alone, so on neither batch nor rank nor epoch. Weights of
    the others are such that their mean is one.

    Args:
        latents (`Tensor`): one side of the pairs, shape ``(pairs, ...)``.
        num_members: of the head.
    """
    bits = latents.detach().flatten(1)[:, :4].float().contiguous().view(torch.int32).long().sum(dim=1)
    members = torch.arange(1, num_members + 1, device=bits.device)[:, None]
    # Integers of 64 bits wrap around; the steps are those of splitmix64.
    mixed = bits[None] + members * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 27)) * 0x3C79AC492BA7B653
    mixed = (mixed ^ (mixed >> 33)) * 0x1C69B3F74AC4AE35
    return ((mixed >> 40) % 4 != 0).float() * (4 / 3)
