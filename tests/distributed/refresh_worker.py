"""Refreshes the reward of a tiny run and writes what each rank ends with; started by torchrun from test_refresh.py.

python refresh_worker.py OUTPUT_DIR PER_DEVICE_BATCH_SIZE
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.alignment.helpers import logged, lora_tensors
from tests.distill.test_refresh import Shade, make, reward_tensors


def run(output_dir: Path, batch_size: int) -> dict[str, object]:
    """Two generations with a refresh between them."""
    judge = Shade()
    settings = {
        "per_device_train_batch_size": batch_size,
        "max_steps": 4,
        "save_strategy": "no",
        "learning_rate": 1e-3,
    }
    trainer, refresh = make(output_dir, judge, **settings)
    trainer.train()
    return {
        "asked": judge.asked,
        "reward": reward_tensors(refresh),
        "lora": lora_tensors(trainer),
        "accuracies": [(record.accuracy_before, record.accuracy_after) for record in refresh.records],
        "pairs": [record.pairs for record in refresh.records],
        "denoiser_calls": logged(trainer, "denoiser_calls"),
        "judge_calls": logged(trainer, "judge_calls"),
        "processes": trainer.accelerator.num_processes,
    }


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    result = run(directory, int(sys.argv[2]))
    torch.save(result, directory / f"rank{torch.distributed.get_rank()}.pt")
