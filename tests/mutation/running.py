"""Runs tests in forked processes, which share what takes long to import, under a limit of computing time."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest


STUCK_AFTER = 30
"""Times the limit of computing time by the clock, after which a run that neither computes nor ends is given up."""


@dataclass(frozen=True)
class Run:
    """How tests ended.

    Args:
        code: what pytest returns, or a negative number where the process was ended by a signal.
        seconds: computing time.
        failed: the first test that failed; empty if none did.
    """

    code: int
    seconds: float
    failed: str = ""

    @property
    def passed(self) -> bool:
        return self.code == pytest.ExitCode.OK

    @property
    def too_long(self) -> bool:
        return self.code == -signal.SIGXCPU

    @property
    def noticed(self) -> bool:
        """Whether the tests noticed a fault: one failed, could not be collected, or computed far longer than without it.

        A process that something else ended (no memory, a stall) says nothing about the tests.
        """
        return self.too_long or self.code in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)


def run_tests(tests: Path, root: Path, seconds: int, first: list[str]) -> Run:
    """Runs tests in a process of their own.

    Args:
        tests: a file or directory below ``root``.
        seconds: of computing time, not by the clock: a busy machine ends nothing.
        first: tests that are run before the others.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        os._exit(_pytest(root, tests, _Order(first, writing)))
    os.close(writing)
    end = time.monotonic() + STUCK_AFTER * seconds
    found = 0
    while not found:
        found, status, used = os.wait4(child, os.WNOHANG)
        if not found and time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            found, status, used = os.wait4(child, 0)
        time.sleep(0.02)
    with os.fdopen(reading) as pipe:
        failed = pipe.readline().strip()
    return Run(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, failed)


class _Order:
    """Plugin that runs some tests first and writes the name of one that failed."""

    def __init__(self, first: list[str], writing: int) -> None:
        self._places = {name: place for place, name in enumerate(first)}
        self._writing = writing

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self._places.get(item.nodeid, len(self._places)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            os.write(self._writing, f"{report.nodeid}\n".encode())


def _pytest(root: Path, tests: Path, order: _Order) -> int:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "dina_reward")]:
        del sys.modules[name]
    options = ["-x", "-q", "--timeout=0", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    try:
        return int(pytest.main(options, plugins=[order]))
    except BaseException:
        return int(pytest.ExitCode.INTERNAL_ERROR)
