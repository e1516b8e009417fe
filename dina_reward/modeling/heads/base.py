"""What the kinds of head share: the sizes of their inputs and the last layer."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dina_reward.families import FeatureSizes


def tap_sizes(sizes: FeatureSizes, num_visual_taps: int, num_text_taps: int) -> tuple[list[int], list[int]]:
    """Channels of each visual and of each text tap.

    Raises:
        ValueError: ``sizes`` are of another number of visual taps.
    """
    visual = [sizes.hidden] * num_visual_taps if isinstance(sizes.hidden, int) else list(sizes.hidden)
    if len(visual) != num_visual_taps:
        raise ValueError(f"got {len(visual)} sizes of visual features for {num_visual_taps} visual taps")
    return visual, [max(visual) if sizes.text is None else sizes.text] * num_text_taps


class LogisticSquash(nn.Module):
    """``(e1 - e2) / (1 + exp(-(x - e3) / (|e4| + 1e-6))) + e2`` with fixed bounds ``e1, e2`` and learned ``e3, e4``."""

    def __init__(self, upper: float = 2.0, lower: float = -2.0) -> None:
        super().__init__()
        self.upper, self.lower = upper, lower
        self.center = nn.Parameter(torch.tensor(0.0))
        self.scale = nn.Parameter(torch.tensor(0.15))

    def forward(self, scores: Tensor) -> Tensor:
        steepness = self.scale.abs() + 1e-6
        return (self.upper - self.lower) * torch.sigmoid((scores - self.center) / steepness) + self.lower


def final_scores(linear: nn.Linear, squash: nn.Module | None, hidden: Tensor) -> Tensor:
    """The last layer in float32 even under mixed precision: ``(..., width)`` -> ``(...)``."""
    # The meta device, on which costs are counted, has no autocast to leave.
    with nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False):
        # Under FSDP2's mixed precision the gathered weights are bfloat16.
        scores = F.linear(hidden.float(), linear.weight.float(), linear.bias.float()).squeeze(-1)
        return scores if squash is None else squash(scores)
