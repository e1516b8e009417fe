"""Commands in processes of their own end with the process that started them, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from dina_reward.checks.children import in_parallel, run_child


SLEEP = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(100)"


def run(code: str, *arguments: object) -> int:
    with open(os.devnull, "wb") as log:
        return run_child([sys.executable, "-c", code, *map(str, arguments)], log, os.environ)[0]


def wait_until(happened: Callable[[], bool], what: str) -> None:
    for _ in range(200):
        if happened():
            return
        time.sleep(0.05)
    pytest.fail(what)


def test_results_are_in_the_order_of_the_calls(tmp_path: Path) -> None:
    codes = [
        partial(run, f"import time; time.sleep({pause}); raise SystemExit({code})")
        for code, pause in ((3, 0.1), (0, 0))
    ]
    assert in_parallel(codes, 2, "commands") == [3, 0]


def test_after_a_failure_nothing_more_is_started() -> None:
    begun = []

    def fails() -> None:
        begun.append(1)
        raise RuntimeError("the first")

    with pytest.raises(RuntimeError, match="the first"):
        in_parallel([fails, partial(time.sleep, 0.2), partial(begun.append, 2)], 1, "commands")
    assert begun == [1]


def test_an_interrupt_ends_what_runs_and_starts_nothing_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> int:
        wait_until((tmp_path / "one").exists, "the command does not start")
        raise KeyboardInterrupt

    started = time.monotonic()
    calls = [interrupted, partial(run, SLEEP, tmp_path / "one"), partial(run, SLEEP, tmp_path / "two")]
    with pytest.raises(KeyboardInterrupt):
        in_parallel(calls, 2, "commands")
    assert time.monotonic() - started < 50
    assert not (tmp_path / "two").exists()
    assert "What is complete is kept; the same command goes on" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is a signal on Linux alone")
@pytest.mark.parametrize("killed_by", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_does_not_outlive_its_parent(tmp_path: Path, killed_by: signal.Signals) -> None:
    script = textwrap.dedent(
        """
        import os, sys
        from dina_reward.checks.children import run_child
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
        run_child([sys.executable, "-c", code], sys.stdout, os.environ)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child = Path("/proc", parent.stdout.readline().decode().strip())
        parent.send_signal(killed_by)
    wait_until(lambda: not child.exists() or " Z " in (child / "stat").read_text(), "the child outlived its parent")
