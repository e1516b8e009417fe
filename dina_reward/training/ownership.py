"""Who writes into an output directory: one run at a time, and each checkpoint knows its run."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dina_reward.checks.stored import read_json


LOCK_NAME = ".run.lock"
RUN_NAME = "run.json"


def new_run() -> str:
    """Name of a new run."""
    return uuid.uuid4().hex[:16]


def run_of(checkpoint: Path) -> str | None:
    """The run that wrote a checkpoint; ``None`` where that is not known."""
    try:
        run = read_json(checkpoint / RUN_NAME)["run"]
    except (ValueError, TypeError, KeyError):
        return None
    return run if isinstance(run, str) else None


def write_run(checkpoint: Path, run: str) -> None:
    """Writes down which run a checkpoint is of, and where it was made."""
    facts = {"run": run, "host": socket.gethostname(), "pid": os.getpid()}
    (checkpoint / RUN_NAME).write_text(json.dumps(facts) + "\n", encoding="utf-8")


def step_of(checkpoint: Path) -> int | None:
    """The step in the name of a checkpoint directory; ``None`` for other directories."""
    step = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(step) if step.isdecimal() and step != checkpoint.name and checkpoint.is_dir() else None


def checkpoints_of(run_dir: Path, run: str | None) -> list[Path]:
    """Checkpoints of a run, oldest first, behind those whose run is not known; those of other runs are left out."""
    found = []
    for path in run_dir.iterdir() if run_dir.is_dir() else ():
        step = step_of(path)
        owner = None if step is None else run_of(path)
        if step is not None and owner in (None, run):
            # The clock may jump: within a run, steps say what is older.
            age = path.stat().st_mtime_ns if owner is None else 0
            found.append((owner is not None, age, step, path))
    return [path for *_, path in sorted(found)]


def last_checkpoint(run_dir: Path) -> Path | None:
    """The last checkpoint of the run that wrote one most recently."""
    everything = [path for path in (run_dir.iterdir() if run_dir.is_dir() else ()) if step_of(path) is not None]
    if not everything:
        return None
    newest = run_of(max(everything, key=lambda path: (path.stat().st_mtime_ns, step_of(path))))
    return max((path for path in everything if run_of(path) == newest), key=lambda path: step_of(path) or 0)


def set_aside(checkpoint: Path, run: str) -> None:
    """Renames a checkpoint that is of another run than this one, which is about to write one of its name."""
    other = run_of(checkpoint) if checkpoint.is_dir() else None
    if other not in (None, run):
        os.rename(checkpoint, checkpoint.with_name(f"{checkpoint.name}-of-{other}"))


@contextlib.contextmanager
def sole_owner(directory: Path, run: str) -> Iterator[None]:
    """Inside the context no other process, on whatever machine, trains into this directory.

    The operating system takes the lock back from a process that is killed. File systems without locks have none.

    Raises:
        ValueError: another run is there; the message says which process on which machine.
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
                raise ValueError(
                    f"another run is writing into {directory} ({file.read().strip()}); wait for its end, or choose another "
                    "output_dir"
                ) from error
            except OSError:  # the file system has no locks
                yield
                return
            if not _is_still(path, file.fileno()):
                continue  # the one that held it has just ended and removed it
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}, run {run}\n")
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
