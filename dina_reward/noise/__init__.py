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
        check_known_process,
        expand_as,
        flow_matching_scheduler,
        is_flow_matching,
    )
    from dina_reward.noise.states import model_states, rescales_states

__getattr__, __dir__, __all__ = lazy_exports(__name__)
