"""One process for all files here whose runs are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def killed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """``killed(job)`` is the report that a job of `tests.integration.kill_workers` has written.

    The first call runs the jobs of all files that are tested (their ``KILLS``), once for all workers of pytest-xdist. Where
    a file has ``arguments_of``, it makes the arguments of its job from its tests.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "killed"
    root.mkdir(exist_ok=True)
    items: dict[Any, list[pytest.Item]] = {}
    for item in request.session.items:
        if item.path.parent == Path(__file__).parent and hasattr(item.module, "KILLS"):  # type: ignore[attr-defined]
            items.setdefault(item.module, []).append(item)  # type: ignore[attr-defined]
    jobs = {
        module.KILLS: module.arguments_of(tests) if hasattr(module, "arguments_of") else []
        for module, tests in items.items()
    }

    def report(job: str) -> dict[str, Any]:
        with FileLock(root / "lock"):
            if not (root / "jobs.json").exists():
                (root / "jobs.json").write_text(json.dumps(jobs))
                script = Path(__file__).with_name("kill_workers.py")
                command = [sys.executable, str(script), str(root), str(root / "jobs.json")]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                (root / "errors.txt").write_text(done.stderr)
        assert (root / "codes.json").exists(), (root / "errors.txt").read_text()[-3000:]
        code = json.loads((root / "codes.json").read_text())[job]
        assert code == 0, (root / job / "log.txt").read_text()[-3000:]
        return json.loads((root / job / "report.json").read_text())

    return report
