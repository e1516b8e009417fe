"""The kinds of reward head by name."""

from __future__ import annotations

from typing import TypeAlias

from dina_reward.families import FeatureSizes
from dina_reward.head import HeadKind, RewardHead, RewardHeadConfig
from dina_reward.head_conv import ConvHead
from dina_reward.head_pooled import PooledHead


Head: TypeAlias = RewardHead | PooledHead | ConvHead

HEADS: dict[HeadKind, type[Head]] = {
    "query": RewardHead,
    "pooled": PooledHead,
    "conv": ConvHead,
}
"""Classes built from ``(config, sizes, num_visual_taps=, num_text_taps=)`` whose instances are called as
``head(features, num_levels)``."""


def build_head(config: RewardHeadConfig, sizes: FeatureSizes, *, num_visual_taps: int, num_text_taps: int) -> Head:
    """The head of the configured kind; see `RewardHead` for the arguments."""
    return HEADS[config.kind](config, sizes, num_visual_taps=num_visual_taps, num_text_taps=num_text_taps)
