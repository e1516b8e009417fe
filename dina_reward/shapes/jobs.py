"""Runs the jobs of a comparison, each in a process of its own, several at the same time."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dina_reward.checkpoints import kept_results
from dina_reward.checks.children import in_parallel, run_child


RESULT_NAME = "result.json"
_REQUEST_NAME = "request.json"


@dataclass(frozen=True)
class Job:
    """A command that leaves a file when it has done its work.

    Args:
        arguments: of the Python interpreter. Those that are a `Path` say where something is, the others what is done.
        result: the file; where one of the same job is there, it is kept. ``log.txt`` with all output goes beside it.
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
        request = self.result.with_name(_REQUEST_NAME)
        words = [str(word) for word in self.arguments if not isinstance(word, Path)]
        wanted = kept_results.identity({"arguments": words})
        # Results of earlier versions have no request beside them.
        if self.result.is_file() and (not request.exists() or kept_results.read_result(request, wanted) is not None):
            return
        self.result.unlink(missing_ok=True)
        command, log = [sys.executable, *map(str, self.arguments)], self.result.with_name("log.txt")
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(log, "w", encoding="utf-8") as file:
            code, _ = run_child(command, file, environment)
        if code or not self.result.is_file():
            raise RuntimeError(
                f"{' '.join(command)} ended with {code} and should have written {self.result}; see {log}"
            )
        kept_results.write_result(request, wanted, {})


def threads_per_job(at_once: int) -> int:
    """Threads of each of several jobs that share the cores."""
    return max(1, (os.cpu_count() or 1) // at_once)


def run_jobs(jobs: Sequence[Job], at_once: int) -> None:
    """Runs jobs in order, so many at the same time; the first failure is raised when those that run have ended.

    Raises:
        RuntimeError: a job failed.
    """
    threads = threads_per_job(at_once)
    in_parallel([partial(job.run, threads) for job in jobs], at_once, "jobs")


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Writes a job's figures, whose presence says that it is done."""
    kept_results.write_whole(directory / RESULT_NAME, json.dumps(result, indent=1) + "\n")
