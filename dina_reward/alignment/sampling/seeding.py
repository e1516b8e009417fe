"""Seeds derived from what a random draw is for, so that it does not depend on when or on which rank it happens."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from dina_reward.noise.draws import fold_seed


class Stream(IntEnum):
    """What a draw is for; it follows the run's seed in `dina_reward.noise.draws.fold_seed`."""

    INITIAL_LATENTS = 0
    STEP_NOISE = 1
    SDE_WINDOW = 2
    REWARD_NOISE = 3
    PROMPT_ORDER = 4
    CHUNK_ORDER = 5
    EVALUATION_LATENTS = 6
    EVALUATION_REWARD = 7
    TRAIN_NOISE = 8
    TRAIN_TIMESTEP = 9
    TRAINED_STEPS = 10
    SEARCH = 11


def generator_from(*parts: int) -> torch.Generator:
    """A CPU generator seeded with ``fold_seed(*parts)``."""
    return torch.Generator().manual_seed(fold_seed(*parts))


def noise_by_row(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise where row ``i`` depends on ``seeds[i]`` alone: not on the batch, device or number of ranks.

    Args:
        seeds: one seed per row.
        shape: shape of one row.

    Returns:
        `Tensor` of shape ``(len(seeds), *shape)``, float32, on the CPU.
    """
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
