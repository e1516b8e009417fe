"""Commands in processes of their own, several at the same time; none outlives the process that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from tqdm.auto import tqdm


Result = TypeVar("Result")
_TIE = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {signal.SIGKILL:d})
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Becomes the command, once the end of its parent ends it.

It is a program of its own, not a `preexec_fn`: that would be Python in a fork of a process whose other threads may have held
any lock, which can crash or wait for ever.
"""
_running: set[int] = set()


def run_child(command: Sequence[str], log: Any, environment: Mapping[str, str]) -> tuple[int, Any]:
    """Runs a command to its end; it ends (on Linux) when this process does, even if this one is killed.

    Args:
        log: open file that gets all output.

    Returns:
        Its exit code, and what it used by `resource.getrusage`, where the system counts that.
    """
    tie = [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid())] if sys.platform == "linux" else []
    process = subprocess.Popen([*tie, *command], stdout=log, stderr=subprocess.STDOUT, env=dict(environment))
    _running.add(process.pid)
    try:
        if not hasattr(os, "wait4"):
            return process.wait(), None
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, used
    finally:
        _running.discard(process.pid)


def in_parallel(calls: Sequence[Callable[[], Result]], at_once: int, name: str) -> list[Result]:
    """Results of calls that run commands, started in order, so many at the same time.

    The first failure is raised when those that run have ended; no other is started. On Ctrl-C they get a SIGTERM.

    Args:
        name: of the progress bar.
    """
    stopped = threading.Event()

    def unless_stopped(call: Callable[[], Result]) -> Result:
        if stopped.is_set():
            raise CancelledError
        try:
            return call()
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(calls), desc=name) as progress:
        futures = [pool.submit(unless_stopped, call) for call in calls]
        for future in futures:
            future.add_done_callback(lambda _: progress.update())
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            stopped.set()
            progress.write("What is complete is kept; the same command goes on.", file=sys.stderr)
            _end_all(futures)
            raise


def _end_all(futures: Sequence[Future[Any]]) -> None:
    """Tells every command to end, once, also those that are just being started."""
    told: set[int] = set()
    while not all(future.done() for future in futures):
        for process in _running - told:
            told.add(process)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        wait(futures, timeout=0.2)
