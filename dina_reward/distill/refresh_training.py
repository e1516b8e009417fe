"""Training of a reward in the middle of another run, which notices nothing of it."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from dina_reward.likelihood import PreferenceLossName
from dina_reward.noise.draws import fold_seed
from dina_reward.reward import LatentReward
from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig
from dina_reward.training.run_settings import dataset_digest


_REPLAY = 0x72706C


class ReplayedPairs(Dataset[dict[str, Any]]):
    """New pairs and a random choice of old ones.

    Args:
        new: preference records of this refresh.
        old: datasets of earlier ones.
        share: old pairs per new pair, as far as there are so many.
        seed: of the choice.
    """

    def __init__(self, new: Any, old: Sequence[Any], share: float, seed: int) -> None:
        earlier: Any = ConcatDataset(list(old)) if old else []
        count = min(len(earlier), round(share * len(new)))
        generator = torch.Generator().manual_seed(fold_seed(seed, _REPLAY))
        rows = sorted(torch.randperm(len(earlier), generator=generator)[:count].tolist())
        self.replayed = len(rows)
        self._rows: Any = ConcatDataset([new, Subset(earlier, rows)]) if rows else new
        digest = hashlib.sha256(repr(rows).encode())
        for part in (new, *old):
            digest.update(str(dataset_digest(part)).encode())
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._rows[index]
        return row

    def fingerprint(self) -> str:
        """Digest of all datasets and of what was chosen from them."""
        return self._digest


def continue_training(
    reward: LatentReward,
    pairs: Any,
    directory: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    loss_type: PreferenceLossName | None,
    seed: int,
    outer: Any,
) -> None:
    """Trains LoRA and head of a reward further, in all processes of a run that goes on afterwards as if nothing had been.

    Args:
        reward: whose LoRA is apart from its backbone, before and after.
        pairs: preference records.
        directory: of the training's own files.
        steps: optimizer steps.
        batch_size: pairs of a step, over all processes.
        learning_rate: constant.
        loss_type: of `LatentRewardTrainingConfig`; by default the negative log-likelihood.
        seed: of order, levels and noise.
        outer: trainer of the run.

    Raises:
        ValueError: the batch cannot be split over the processes.
    """
    args = outer.args
    if batch_size % args.world_size:
        raise ValueError(
            f"batch_size {batch_size} of the refresh cannot be split over {args.world_size} processes; make it a multiple"
        )
    usual: PreferenceLossName = "bradley_terry" if reward.config.likelihood == "bradley_terry" else "thurstone_nll"
    with undisturbed(outer.accelerator):
        config = LatentRewardTrainingConfig(
            output_dir=str(directory),
            max_steps=steps,
            per_device_train_batch_size=batch_size // args.world_size,
            learning_rate=learning_rate,
            loss_type=loss_type or usual,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=args.use_cpu,
            bf16=args.bf16,
            fp16=args.fp16,
            seed=seed % 2**32,
            dataloader_drop_last=len(pairs) >= batch_size,
        )
        trainer = LatentRewardTrainer(reward, config, train_dataset=pairs)
        trainer.train()
        reward.model.zero_grad(set_to_none=True)
        at_rest(reward)


def at_rest(reward: LatentReward) -> None:
    """Ready to score, with the LoRA apart: merging it and taking it out again would change the backbone by a rounding."""
    reward.unmerge_lora()
    reward.model.eval().set_trainable(False)


@contextlib.contextmanager
def undisturbed(accelerator: Any) -> Iterator[None]:
    """Context after which the random states and accelerate's shared state are what they were before."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    gradient = dict(vars(accelerator.gradient_state))
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            shared = vars(accelerator.gradient_state)
            shared.clear()
            shared.update(gradient)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


def state_of(reward: LatentReward) -> dict[str, Tensor]:
    """Copies of LoRA and head."""
    return {name: parameter.detach().clone() for name, parameter in reward.model.trainable_state().items()}


@torch.no_grad()
def restore(reward: LatentReward, state: dict[str, Tensor]) -> None:
    """Puts back what `state_of` returned."""
    for name, parameter in reward.model.trainable_state().items():
        parameter.copy_(state[name])
