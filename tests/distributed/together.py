"""Runs the work of several test files in one pair of gloo processes, whose start costs more than the work.

python together.py DIRECTORY JOB [JOB ...]

Both are forks of one process, which imports the libraries once and tells them what torchrun would. Each job writes into a
folder of its name in ``DIRECTORY``, and rank 0 leaves a file `DONE` in it at its end.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState

from tests.forks import fork


DONE = "done"
RANKS = 2
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


def work(directory: Path, modules: dict[str, ModuleType], rank: int) -> None:
    """Runs the jobs one after another as one of the ranks; the first error ends it."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    random.seed()  # two processes that have nothing in common would not draw the same
    np.random.seed()  # noqa: NPY002
    rendezvous = f"file://{directory.resolve()}/rendezvous-{os.getppid()}"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=RANKS)
    for name, module in modules.items():
        print(f"job {name}", flush=True)
        module.work(directory / name)
        torch.distributed.barrier()
        # Settings of one trainer, such as sharding, must not reach the next one's.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        if rank == 0:
            (directory / name / DONE).touch()
    torch.distributed.destroy_process_group()


def main(directory: Path, names: list[str]) -> int:
    """Runs the jobs in two ranks; the exit code of the first that fails, which ends the other one too."""
    modules = {name: import_module(JOBS[name]) for name in names}
    gc.freeze()  # see tests/conftest.py
    running = {fork(partial(work, directory, modules, rank)) for rank in range(RANKS)}
    code = 0
    while running:
        child, status = os.wait()
        running.discard(child)
        if code == 0 and status != 0:
            code = os.waitstatus_to_exitcode(status)
            for other in running:
                os.kill(other, signal.SIGKILL)
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
