"""Trains the tiny policy and writes what each rank saw; a job of together.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from dina_reward.alignment import DiffusionGRPOTrainer
from tests.alignment.helpers import PROMPTS, logged, lora_tensors, tiny_trainer


class GradientBytes(TrainerCallback):
    """Adds up the bytes that DDP reduces over the ranks."""

    def __init__(self, trainer: DiffusionGRPOTrainer) -> None:
        self.trainer = trainer
        self.bytes = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        model = self.trainer.model_wrapped
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, self._reduce)

    # DDP compares annotations with its own types, which those of this module are not: they are text.
    def _reduce(self, state, bucket):
        self.bytes += bucket.buffer().numel() * bucket.buffer().element_size()
        return allreduce_hook(state, bucket)


def run(output_dir: Path, batch_size: int) -> tuple[DiffusionGRPOTrainer, dict[str, object]]:
    """Two generations of two optimizer steps each, with KL, EMA, evaluation and a checkpoint."""
    trainer = tiny_trainer(
        output_dir,
        per_device_train_batch_size=batch_size,
        max_steps=4,
        learning_rate=1e-3,
        beta=0.1,
        num_iterations=1,
        eval_dataset=PROMPTS,
        save_strategy="steps",
        save_steps=4,
    )
    experience, _ = trainer.make_experience(0)
    maker = trainer.experience_maker
    gradients = GradientBytes(trainer)
    trainer.add_callback(gradients)
    trainer.train()
    evaluation = trainer.evaluate()
    big = torch.tensor([2**53 + 1 + trainer.accelerator.process_index, 2**24 + 1])
    return trainer, {
        "rows": [row for part in experience for row in part.rows],
        "initial": torch.cat([maker.initial_latents(0, part.rows) for part in experience]),
        "window": list(experience[0].rollout.stochastic),
        "final": torch.cat([part.rollout.latents for part in experience]),
        "advantages": torch.cat([part.advantages for part in experience]),
        "lora": lora_tensors(trainer),
        "gradient_bytes": gradients.bytes,
        "reward": logged(trainer, "reward"),
        "loss": logged(trainer, "loss"),
        "ratio": logged(trainer, "ratio/max"),
        "eval_reward": evaluation["eval_reward"],
        "gathered": trainer.accelerator.gather(big),
    }


def work(directory: Path) -> None:
    trainer, result = run(directory, 3)
    assert trainer.accelerator.num_processes == 2
    torch.save(result, directory / f"rank{trainer.accelerator.process_index}.pt")
