"""Trains the tiny policy and writes what each rank saw; a job of together.py."""

from __future__ import annotations

from pathlib import Path

import torch

from dina_reward.alignment import DiffusionGRPOTrainer
from tests.alignment.helpers import PROMPTS, logged, lora_tensors, tiny_trainer


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
