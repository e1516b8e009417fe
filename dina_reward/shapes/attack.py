"""Samples of generators that were aligned with a reward until it was hacked: hard pairs for the reward that comes next.

A reward is right where it was trained, and the policy goes where it is wrong: to patterns that please it, such as dots,
halos and shapes without an outline. Pairs of such samples, judged by the oracle, close the holes that one reward has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dina_reward.alignment import (
    AlignmentTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    RewardBackpropConfig,
    RewardBackpropTrainer,
)
from dina_reward.noise.draws import fold_seed
from dina_reward.reward import LatentReward
from dina_reward.shapes.alignment import alignment_settings, training_prompts
from dina_reward.shapes.prompts import SPLITS, sample_prompts
from dina_reward.shapes.shipped import quiet_pipeline
from dina_reward.shapes.worlds import world_of


REFL = {
    "method": "refl",
    "max_steps": 60,
    "per_device_train_batch_size": 64,
    "steps_per_generation": 1,
    "num_generations": 1,
    "learning_rate": 1e-3,
}
"""Reward back-propagation with nothing that holds it back finds the patterns that please a reward within seconds."""

ATTACKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "refl-0.4": {**REFL, "reward_noise_level": [0.4], "grad_step_range": [1, 5]},
        "refl-0.1": {**REFL, "reward_noise_level": [0.1]},
        "grpo": {"max_steps": 80, "learning_rate": 1.5e-3},
    }
)
"""The runs against a reward: settings that differ from those of `alignment_settings`."""

SNAPSHOTS = (0.25, 0.5, 1.0)
"""Shares of a run after which samples are taken, so that both mild and strong exaggeration is among them."""


def attack_reward(
    pipeline_path: str | Path, reward_path: str | Path, output: str | Path, counts: Mapping[str, int], seed: int
) -> dict[str, Tensor]:
    """Align a generator with a reward in several ways, with no restraint, and take samples on the way.

    Args:
        pipeline_path: the generator.
        reward_path: the reward.
        output: directory of the runs.
        counts: samples to take for the prompts of each split.
        seed: of every draw.

    Returns:
        Latents for each split, shape ``(counts[split], 8, 8, 8)``, in random order.
    """
    shares = len(ATTACKS) * len(SNAPSHOTS)
    taken: dict[str, list[Tensor]] = {split: [] for split in SPLITS}
    for number, name in enumerate(ATTACKS):
        pipeline = quiet_pipeline(pipeline_path)
        reward = LatentReward.from_pretrained(reward_path, pipeline=pipeline, share_backbone=True)
        each = {split: -(-count // shares) for split, count in counts.items()}
        snapshots = _Snapshots(pipeline, each, fold_seed(seed, number))
        trainer = _trainer(pipeline, reward, name, Path(output, name), seed + number, snapshots)
        trainer.train()
        for split, samples in snapshots.taken():
            taken[split].append(samples)
    generator = torch.Generator().manual_seed(seed)
    latents = {split: torch.cat(parts) for split, parts in taken.items()}
    return {
        split: latents[split][torch.randperm(len(latents[split]), generator=generator)[:count]]
        for split, count in counts.items()
    }


def _trainer(
    pipeline: Any, reward: LatentReward, name: str, output: Path, seed: int, callback: TrainerCallback
) -> AlignmentTrainer:
    settings = {
        **alignment_settings(world_of(pipeline)),
        "output_dir": str(output),
        "eval_strategy": "no",
        "eval_on_start": False,
        "seed": seed,
        **ATTACKS[name],
    }
    prompts = training_prompts(seed)
    if "method" not in settings:
        return DiffusionGRPOTrainer(pipeline, reward, DiffusionGRPOConfig(**settings), prompts, callbacks=[callback])
    known = RewardBackpropConfig.__dataclass_fields__
    config = RewardBackpropConfig(**{key: value for key, value in settings.items() if key in known})
    return RewardBackpropTrainer(pipeline, reward, config, prompts, callbacks=[callback])


class _Snapshots(TrainerCallback):
    """Takes samples of the policy at `SNAPSHOTS` of a run."""

    def __init__(self, pipeline: Any, counts: Mapping[str, int], seed: int) -> None:
        self._pipeline, self._counts, self._seed = pipeline, counts, seed
        self._taken: dict[str, list[Tensor]] = {split: [] for split in counts}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in {round(share * state.max_steps) for share in SNAPSHOTS}:
            return
        sample = world_of(self._pipeline).sample
        for number, (split, count) in enumerate(self._counts.items()):
            seed = fold_seed(self._seed, state.global_step, number)
            prompts = sample_prompts(count, split, seed=seed)
            self._taken[split].append(sample(self._pipeline, prompts, torch.Generator().manual_seed(seed)))

    def taken(self) -> Iterator[tuple[str, Tensor]]:
        """Samples by split."""
        for split, parts in self._taken.items():
            yield split, torch.cat(parts)
