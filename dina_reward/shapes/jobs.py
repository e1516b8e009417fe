"""Runs the jobs of a comparison, each in a process of its own, several at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dina_reward.checkpoints.atomic import atomic_file


RESULT_NAME = "result.json"


@dataclass(frozen=True)
class Job:
    """A command that leaves a file when it has done its work.

    Args:
        arguments: of the Python interpreter.
        result: the file; a job whose file is there is not run again. ``log.txt`` with all output goes beside it.
    """

    arguments: Sequence[str | Path | int | float]
    result: Path

    def run(self, threads: int) -> None:
        """Runs the command, unless its work is done.

        Args:
            threads: of torch.

        Raises:
            RuntimeError: the command failed or left no result.
        """
        if self.result.is_file():
            return
        command, log = [sys.executable, *map(str, self.arguments)], self.result.with_name("log.txt")
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(log, "w", encoding="utf-8") as file:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
            ).returncode
        if code or not self.result.is_file():
            raise RuntimeError(
                f"{' '.join(command)} ended with {code} and should have written {self.result}; see {log}"
            )


def threads_per_job(at_once: int) -> int:
    """Threads of each of several jobs that share the cores."""
    return max(1, (os.cpu_count() or 1) // at_once)


def run_jobs(jobs: Sequence[Job], at_once: int) -> None:
    """Runs jobs in order, so many at the same time; the first failure is raised when those that run have ended.

    Raises:
        RuntimeError: a job failed.
    """
    threads = threads_per_job(at_once)
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), desc="jobs") as progress:
        futures = [pool.submit(job.run, threads) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda _: progress.update())
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Writes a job's figures, whose presence says that it is done."""
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(directory / RESULT_NAME) as staging:
        staging.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
