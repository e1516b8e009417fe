"""Which run a checkpoint in an output directory is of: each knows it, and no run touches those of another."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dina_reward.checks.stored import read_json


RUN_NAME = "run.json"


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
