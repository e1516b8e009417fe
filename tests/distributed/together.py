"""Runs the work of several test files in one pair of gloo processes, whose start costs more than the work.

torchrun --standalone --nproc_per_node 2 together.py DIRECTORY JOB [JOB ...]

Each job writes into a folder of its name in ``DIRECTORY``, and rank 0 leaves a file `DONE` in it at its end.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState


DONE = "done"
JOBS = {
    "cache": "tests.distributed.cache_worker",
    "reward": "tests.distributed.test_reward_trainer",
    "bucketed": "tests.distributed.test_bucketed_trainer",
    "grpo": "tests.distributed.grpo_worker",
    "algorithms": "tests.distributed.algorithms_worker",
    "other_algorithms": "tests.distributed.algorithms_worker",
    "fsdp_policy": "tests.distributed.fsdp_worker",
    "fsdp_reward": "tests.distributed.reward_fsdp_worker",
}
"""Module by name of the job; its function ``work`` takes the folder."""


def main(directory: Path, names: list[str]) -> None:
    """Runs the jobs one after another; the first error ends both processes."""
    torch.distributed.init_process_group("gloo")
    assert torch.distributed.get_world_size() == 2
    modules = {name: import_module(JOBS[name]) for name in names}
    gc.freeze()  # see tests/conftest.py
    for name, module in modules.items():
        print(f"job {name}", flush=True)
        module.work(directory / name)
        torch.distributed.barrier()
        # Settings of one trainer, such as sharding, must not reach the next one's.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        if torch.distributed.get_rank() == 0:
            (directory / name / DONE).touch()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
