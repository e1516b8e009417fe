"""Noise for training pairs: one level per pair, and one noise tensor that both of its sides see (or one for each)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dina_reward.noise import LevelSampler, NoisePoint, NoiseProcess
from dina_reward.noise.draws import draw_noise, fold_seed


_LEVEL_STREAM, _NOISE_STREAM, _REJECTED_STREAM = 0, 1, 2


@dataclass(frozen=True)
class NoisedPairs:
    """Both sides of a batch of pairs at their common level.

    Args:
        latents (`Tensor`): shape ``(2 * pairs, ...)``, float32; the chosen sides first, then the rejected ones.
        point (`NoisePoint`): level and timestep of every pair, shape ``(pairs,)``, on the device of ``latents``.
        noise (`Tensor`): the noise of the chosen sides, shape ``(pairs, ...)``, float32.
        rejected_noise (`Tensor`): that of the rejected sides; the same tensor unless each side has noise of its own.
    """

    latents: Tensor
    point: NoisePoint
    noise: Tensor
    rejected_noise: Tensor


@dataclass(frozen=True)
class PairNoiser:
    """Adds noise to training pairs: ``x = a(sigma) x_0 + sigma eps`` with ``sigma`` and ``eps`` shared inside a pair.

    Shared noise cancels in the comparison of a pair (arXiv 2602.11146); DRM gives each side noise of its own.

    What a pair draws depends on the seed, the optimizer step and the pair's position in that step's batch across all
    ranks and accumulated micro-batches, and on nothing else. So a resumed run repeats its draws, ranks never share one,
    and the same total batch gets the same noise however it is split.

    Args:
        process: noise process of the reward's backbone, whose grid levels snap to.
        levels: distribution of the levels.
        seed: seed of the run.
        share_noise: whether both sides of a pair see the same noise.
    """

    process: NoiseProcess
    levels: LevelSampler
    seed: int
    share_noise: bool = True

    def __call__(self, chosen: Tensor, rejected: Tensor, *, step: int, first_position: int) -> NoisedPairs:
        """Noises a micro-batch.

        Args:
            chosen, rejected (`Tensor`): clean latents, shape ``(pairs, ...)``.
            step: optimizer step.
            first_position: position of the first pair in the step's batch.
        """
        seeds = [fold_seed(self.seed, step, first_position + row) for row in range(chosen.shape[0])]
        streams = [torch.Generator().manual_seed(fold_seed(seed, _LEVEL_STREAM)) for seed in seeds]
        point = self.process.snap(torch.cat([self.levels.sample(1, stream) for stream in streams]))
        point = NoisePoint(point.level.to(chosen.device), point.timestep.to(chosen.device))
        (noise,) = draw_noise(chosen, seed=[fold_seed(seed, _NOISE_STREAM) for seed in seeds])
        other = noise
        if not self.share_noise:
            (other,) = draw_noise(rejected, seed=[fold_seed(seed, _REJECTED_STREAM) for seed in seeds])
        sides = ((chosen, noise), (rejected, other))
        noisy = [self.process.add_noise(side.float(), drawn, point.level) for side, drawn in sides]
        return NoisedPairs(torch.cat(noisy), point, noise, other)
