"""Noise for training pairs: one level and one noise tensor per pair, seen by both of its sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dina_reward.noise import LevelSampler, NoisePoint, NoiseProcess
from dina_reward.noise_draws import draw_noise, fold_seed


_LEVEL_STREAM, _NOISE_STREAM = 0, 1


@dataclass(frozen=True)
class NoisedPairs:
    """Both sides of a batch of pairs under their common noise.

    Args:
        latents (`Tensor`): shape ``(2 * pairs, ...)``, float32; the chosen sides first, then the rejected ones.
        point (`NoisePoint`): level and timestep of every pair, shape ``(pairs,)``, on the device of ``latents``.
        noise (`Tensor`): the noise of every pair, shape ``(pairs, ...)``, float32.
    """

    latents: Tensor
    point: NoisePoint
    noise: Tensor


@dataclass(frozen=True)
class PairNoiser:
    """Adds noise to training pairs: ``x = a(sigma) x_0 + sigma eps`` with ``sigma`` and ``eps`` shared inside a pair.

    What a pair draws depends on the seed, the optimizer step and the pair's position in that step's batch across all
    ranks and accumulated micro-batches, and on nothing else. So a resumed run repeats its draws, ranks never share one,
    and the same total batch gets the same noise however it is split.

    Args:
        process: noise process of the reward's backbone, whose grid levels snap to.
        levels: distribution of the levels.
        seed: seed of the run.
    """

    process: NoiseProcess
    levels: LevelSampler
    seed: int

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
        sides = [self.process.add_noise(side.float(), noise, point.level) for side in (chosen, rejected)]
        return NoisedPairs(torch.cat(sides), point, noise)
