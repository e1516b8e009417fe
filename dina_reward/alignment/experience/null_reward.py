"""A reward of pure noise: what a run gains from it in a judge's eyes is no merit of an algorithm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dina_reward.alignment.sampling.seeding import noise_by_row
from dina_reward.noise.draws import fold_seed


_STREAM = 0x6E756C6C


def null_reward(latents: Tensor, seed: Sequence[int]) -> Tensor:
    """Standard normal numbers that depend on the seeds of the samples alone.

    Args:
        latents: samples, shape ``(batch, ...)``; only their number counts.
        seed: one per sample.

    Returns:
        `Tensor` of shape ``(batch,)``, float32, on the CPU.

    Raises:
        ValueError: samples share a seed, so that a group would not differ and nothing would be trained.
    """
    if len(set(seed)) != len(latents):
        raise ValueError(
            f"{len(latents)} samples have {len(set(seed))} different seeds; the null reward needs one for each: set "
            "share_noise_within_group to false"
        )
    return noise_by_row([fold_seed(_STREAM, value) for value in seed], ())
