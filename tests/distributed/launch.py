"""Starts a worker script in two gloo processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
SOCKET_TROUBLE = ("EADDRINUSE", "address already in use", "Connection re", "Connection closed", "RendezvousConnection")


def launch_two_processes(script: str | Path, *arguments: object, timeout: float = 240) -> None:
    """Runs ``script`` under torchrun; another free port is tried once when the first was taken meanwhile."""
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    for last in (False, True):
        done = subprocess.run(
            [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode == 0:
            return
        if last or not any(trouble in done.stderr for trouble in SOCKET_TROUBLE):
            raise AssertionError(
                f"{script} failed with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
            )
