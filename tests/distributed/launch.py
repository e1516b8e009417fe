"""Starts a worker script in two gloo processes on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


ROOT = Path(__file__).parents[2]
SOCKET_TROUBLE = ("EADDRINUSE", "address already in use", "Connection re", "Connection closed", "RendezvousConnection")


def launch_two_processes(script: str | Path, *arguments: object, timeout: float = 240) -> None:
    """Runs ``script`` under torchrun; another free port is tried once when the first was taken meanwhile."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    try:
        run(command, *arguments, timeout=timeout)
    except AssertionError as error:
        if not any(trouble in str(error) for trouble in SOCKET_TROUBLE):
            raise
        run(command, *arguments, timeout=timeout)


def run(command: Sequence[str], *arguments: object, timeout: float = 240) -> None:
    """Runs a command on the CPU and says what it printed when it fails."""
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:  # with its forks
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, f"{command} failed with {process.returncode}\n{output[-2000:]}\n{errors[-6000:]}"
