"""Runs the workers of several test files in forks of one process, whose imports cost as much as the work.

python kill_workers.py DIRECTORY JOBS.json

The file maps names of `JOBS` to arguments. Each job writes into a folder of its name in ``DIRECTORY``, where its output goes
to ``log.txt``; ``codes.json`` has the exit codes.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.forks import fork
from tests.integration import cache_kill_worker, kill_worker, reward_kill_worker


JOBS: dict[str, Callable[..., None]] = {
    "alignment": kill_worker.main,
    "cache": cache_kill_worker.main,
    "reward": reward_kill_worker.main,
}
"""Functions that take a folder, and their arguments."""


def run(job: str, directory: Path, arguments: Any) -> int:
    """A job in a child, so that it finds the process as no other one left it; its exit code."""

    def work() -> None:
        log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        JOBS[job](directory, *arguments)

    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def main(directory: Path, jobs: dict[str, list[Any]]) -> None:
    codes = {}
    for job, arguments in jobs.items():
        (directory / job).mkdir()
        codes[job] = run(job, directory / job, arguments)
    (directory / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # see tests/conftest.py
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
