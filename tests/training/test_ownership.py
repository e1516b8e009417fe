"""One run at a time in an output directory; checkpoints of other runs are neither rotated away nor overwritten."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dina_reward.checkpoints.locking import LOCK_NAME, sole_owner
from dina_reward.training.ownership import (
    checkpoints_of,
    last_checkpoint,
    run_of,
    set_aside,
    write_run,
)
from tests.training.toy import toy_trainer


def make(run_dir: Path, step: int, run: str | None, age: int = 0) -> Path:
    path = run_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if run is not None:
        write_run(path, run)
    os.utime(path, (1e9 + age, 1e9 + age))
    return path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_runs_of_one_directory_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path, 12, "long", age=1)
    make(tmp_path, 9, None, age=3)
    make(tmp_path, 2, "short", age=5)
    make(tmp_path, 4, "short", age=4)  # the clock was set back
    (tmp_path / "checkpoint-best").mkdir()
    assert names(checkpoints_of(tmp_path, "short")) == ["checkpoint-9", "checkpoint-2", "checkpoint-4"]
    assert names(checkpoints_of(tmp_path, "long")) == ["checkpoint-9", "checkpoint-12"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert last_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_of_another_run_is_set_aside(tmp_path: Path) -> None:
    for run in ("own", "other", None):
        path = make(tmp_path / str(run), 2, run)
        set_aside(path, "own")
        assert path.exists() == (run != "other")
    assert names(list((tmp_path / "other").iterdir())) == ["checkpoint-2-of-other"]


def test_a_new_run_leaves_those_of_the_old_one(tmp_path: Path) -> None:
    toy_trainer(tmp_path, max_steps=6).train()
    old = run_of(tmp_path / "checkpoint-6")
    toy_trainer(tmp_path, max_steps=4, save_total_limit=1).train()
    found = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("checkpoint"))
    assert found == ["checkpoint-2-of-" + str(old), "checkpoint-4", f"checkpoint-4-of-{old}", "checkpoint-6"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    resumed = toy_trainer(tmp_path, max_steps=8)
    resumed.train(resume_from_checkpoint=True)
    assert run_of(tmp_path / "checkpoint-8") == run_of(tmp_path / "checkpoint-4") != old


def in_another_process(code: str, *, wait: bool = True) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if wait:
        child.communicate()
    return child


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from dina_reward.checkpoints.locking import sole_owner
        with sole_owner(Path({str(tmp_path)!r}), "first"):
            print("ready", flush=True)
            sys.stdin.readline()
    """
    first = in_another_process(code, wait=False)
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    message = rf"another run is writing into .*pid {first.pid} on .*, run first"
    with pytest.raises(ValueError, match=message), sole_owner(tmp_path, "second"):
        pass
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, max_steps=2).train()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (tmp_path / LOCK_NAME).exists()
    with sole_owner(tmp_path, "second"):
        assert "run second" in (tmp_path / LOCK_NAME).read_text()
    assert not (tmp_path / LOCK_NAME).exists()
