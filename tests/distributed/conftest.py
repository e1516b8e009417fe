"""One pair of gloo processes for all files here."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.distributed.launch import run
from tests.distributed.together import DONE


SECONDS = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(2 * SECONDS))  # the first of them waits for the jobs of all


@pytest.fixture(scope="session")
def two_processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``two_processes(job)`` is the folder that a job of `tests.distributed.together` has written.

    The first call starts the jobs of all files that are tested (their ``JOB``), once for all workers of pytest-xdist. A job
    that does not end there is started on its own, so that each file reports its own failure.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two_processes"
    root.mkdir(exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("together.py"))]
    jobs = dict.fromkeys(item.module.JOB for item in request.session.items if hasattr(item.module, "JOB"))

    def folder(job: str) -> Path:
        with FileLock(root / "lock"):
            started = root / "started"
            if not started.exists():
                started.touch()
                prepare(root, jobs)
                with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                    run(command, root, *jobs, timeout=SECONDS)
            if not (root / job / DONE).exists():
                prepare(root, [job])
                run(command, root, job)
        return root / job

    return folder


def prepare(root: Path, jobs: Iterable[str]) -> None:
    """Empty folders."""
    for job in jobs:
        shutil.rmtree(root / job, ignore_errors=True)
        (root / job).mkdir()
