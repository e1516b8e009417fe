"""Heads: from tapped features of a noisy latent to one score; one file per kind, and `build_head`, which picks one.

Nothing here knows which model the features come from, or how noisy they are beyond the time embedding it is handed.
Begin at `query`, the published head.
"""

from __future__ import annotations

from typing import TypeAlias

from dina_reward.families import FeatureSizes
from dina_reward.modeling.heads.config import HeadKind, RewardHeadConfig
from dina_reward.modeling.heads.conv import ConvHead
from dina_reward.modeling.heads.ensemble import EnsembleHead
from dina_reward.modeling.heads.pooled import PooledHead
from dina_reward.modeling.heads.query import RewardHead


Head: TypeAlias = RewardHead | PooledHead | ConvHead

HEADS: dict[HeadKind, type[Head]] = {
    "query": RewardHead,
    "pooled": PooledHead,
    "conv": ConvHead,
}
"""Classes built from ``(config, sizes, num_visual_taps=, num_text_taps=)`` whose instances are called as
``head(features, num_levels)``."""


def build_head(
    config: RewardHeadConfig, sizes: FeatureSizes, *, num_visual_taps: int, num_text_taps: int
) -> Head | EnsembleHead:
    """The head of the configured kind, or as many as it has members; see `RewardHead` for the arguments."""

    def build() -> Head:
        return HEADS[config.kind](config, sizes, num_visual_taps=num_visual_taps, num_text_taps=num_text_taps)

    return build() if config.num_members == 1 else EnsembleHead(build, config.num_members)
