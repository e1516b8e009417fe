"""Noise processes, the grid of levels that a scheduler trains on, and the draws of noise and seeds.

Nothing here knows a model or a reward. Begin at `processes.NoiseProcess.add_noise`, the formula everything else rests on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.noise.draws import draw_noise, fold_seed
    from dina_reward.noise.processes import (
        FlowMatchingNoise,
        LevelDistribution,
        LevelSampler,
        NoisePoint,
        NoiseProcess,
        VariancePreservingNoise,
        expand_as,
        flow_matching_scheduler,
        is_flow_matching,
    )

_MODULES = {
    "FlowMatchingNoise": "processes",
    "LevelDistribution": "processes",
    "LevelSampler": "processes",
    "NoisePoint": "processes",
    "NoiseProcess": "processes",
    "VariancePreservingNoise": "processes",
    "draw_noise": "draws",
    "expand_as": "processes",
    "flow_matching_scheduler": "processes",
    "fold_seed": "draws",
    "is_flow_matching": "processes",
}

__all__ = [
    "FlowMatchingNoise",
    "LevelDistribution",
    "LevelSampler",
    "NoisePoint",
    "NoiseProcess",
    "VariancePreservingNoise",
    "draw_noise",
    "expand_as",
    "flow_matching_scheduler",
    "fold_seed",
    "is_flow_matching",
]

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
