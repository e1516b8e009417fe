"""Trains the tiny policy with every algorithm and writes its weights; a job of together.py."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.alignment.helpers import ALGORITHMS, algorithm_trainer, logged, lora_tensors


NAMES = {
    "algorithms": ("grpo", "nft"),
    "other_algorithms": tuple(name for name in ALGORITHMS if name not in ("grpo", "nft")),
}
"""Algorithms of each job; those of the second run with the slow tests."""

SETTINGS = {"nft": {"keep_per_group": 2}}
"""Settings that split a generation in ways of their own."""

COUNTS = ("denoiser_calls", "denoiser_calls/rollout", "denoiser_calls/update", "reward_calls", "decoder_calls")


def run(output_dir: Path, batch_size: int, job: str) -> dict[str, dict[str, object]]:
    """Two generations with every algorithm of a job."""
    results: dict[str, dict[str, object]] = {}
    for name in NAMES[job]:
        settings = {
            "per_device_train_batch_size": batch_size,
            "max_steps": 4,
            "learning_rate": 1e-3,
            **SETTINGS.get(name, {}),
        }
        trainer = algorithm_trainer(name, output_dir / name, **settings)
        trainer.train()
        averaged = {}
        with trainer.averaged_policy():
            averaged = lora_tensors(trainer)
        results[name] = {
            "lora": lora_tensors(trainer),
            "averaged": averaged,
            "reward": logged(trainer, "reward"),
            "grad_norm": logged(trainer, "grad_norm"),
            "costs": {key: logged(trainer, key) for key in COUNTS},
            "processes": trainer.accelerator.num_processes,
        }
    return results


def work(directory: Path) -> None:
    torch.save(run(directory, 3, directory.name), directory / f"rank{torch.distributed.get_rank()}.pt")
