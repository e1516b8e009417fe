"""One process at a time writes into the directory of a long command."""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path


LOCK_NAME = ".run.lock"


class DirectoryInUseError(ValueError):
    """Another process is writing into a directory."""


def new_run() -> str:
    """Name of a new run."""
    return uuid.uuid4().hex[:16]


@contextlib.contextmanager
def sole_owner(directory: Path, run: str | None = None) -> Iterator[None]:
    """Inside the context no other process, on whatever machine, that asks for this directory gets it.

    The operating system takes the lock back from a process that is killed. File systems without locks have none.

    Raises:
        DirectoryInUseError: (a `ValueError`) another run is there; the message says which process on which machine.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_NAME
    while True:
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise DirectoryInUseError(
                    f"another run is writing into {directory} ({file.read().strip()}); wait for its end, or choose another "
                    "directory"
                ) from error
            except OSError:  # the file system has no locks
                yield
                return
            if not _is_still(path, file.fileno()):
                continue  # the one that held it has just ended and removed it
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}, run {run or new_run()}\n")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
