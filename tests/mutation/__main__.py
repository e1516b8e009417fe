"""Which mutants of the mathematics the mirrored tests do not notice.

    python -m tests.mutation --sample 200 --output survivors.json     # or --file likelihood.py, --file ...
    python -m tests.mutation --again survivors.json                   # the survivors alone, after a test was written

Every mutant is a copy of the package with one operator, comparison, sign or constant changed (`tests.mutation.mutants`). It
is caught if a mirrored test fails, or does not end in time. The score is the share that is caught. Tests that fail without
any change would catch everything, so each is first run so. The report is written after every mutant: a run that is cut short
leaves the score of what it tried. Runs on Linux and macOS: tests run in forked processes, which share what takes long to
import.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.mutation.mutants import MIRRORED, Mutant, mutants_of


ROOT = Path(__file__).parents[2]
WARM = ("hypothesis", "pytest", "datasets", "dina_reward.reward", "dina_reward.alignment.policy", "tests.tiny_models")
"""Imported before the processes of the tests are forked, which import the package and its tests anew, but nothing else."""


def caught(mutant: Mutant, root: Path, timeout: float) -> bool:
    """Whether the mirrored tests fail on a mutant, in a copy of the repository at ``root``."""
    target = root / "dina_reward" / mutant.file
    before = target.read_text(encoding="utf-8")
    target.write_text(mutant.text, encoding="utf-8")
    try:
        return not passes(root / "tests" / MIRRORED[mutant.file], root, timeout)
    finally:
        target.write_text(before, encoding="utf-8")


def passes(tests: Path, root: Path, timeout: float) -> bool:
    """Whether tests pass in time, in a process of their own."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os._exit(_run_tests(root, tests))
    return _exit_code(child, timeout) == 0


def _run_tests(root: Path, tests: Path) -> int:
    import pytest

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "dina_reward")]:
        del sys.modules[name]
    try:
        return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]))
    except BaseException:
        return 1


def _exit_code(child: int, timeout: float) -> int:
    """Exit code of the child, which is ended when its time is over."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def drawn(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """A random sample by the digests of the mutants, so that a change elsewhere leaves most of it as it is."""

    def digest(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{seed}\n{mutant.file}\n{mutant.old}\n{mutant.new}".encode()).digest()

    return sorted(mutants, key=digest)[:count]


def copied(root: Path) -> None:
    """Copies what the tests need."""
    for part in ("dina_reward", "tests", "recipes", "examples"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)


def report(drawn: int, tried: int, survivors: list[str], output: Path) -> str:
    """Writes the score of the mutants that were tried, and says it."""
    score = 1 - len(survivors) / max(1, tried)
    figures = {"drawn": drawn, "tried": tried, "caught": round(score, 4), "survivors": survivors}
    output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"{tried - len(survivors)} of {tried} mutants caught ({score:.1%}); see {output}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation score of the mathematics.")
    parser.add_argument("--file", action="append", choices=sorted(MIRRORED), help="these files alone")
    parser.add_argument("--sample", type=int, default=200, help="so many mutants, drawn at random; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--again", type=Path, help="an earlier report, whose survivors alone are tried")
    parser.add_argument("--timeout", type=float, default=180, help="seconds that the tests of a mutant may take")
    parser.add_argument("--output", type=Path, default=Path("survivors.json"), help="score and survivors")
    arguments = parser.parse_args()
    mutants = [mutant for file in arguments.file or MIRRORED for mutant in mutants_of(ROOT / "dina_reward", file)]
    if arguments.again is not None:
        names = set(json.loads(arguments.again.read_text(encoding="utf-8"))["survivors"])
        mutants = [mutant for mutant in mutants if str(mutant) in names]
    elif 0 < arguments.sample < len(mutants):
        mutants = drawn(mutants, arguments.sample, arguments.seed)
    for name in WARM:
        importlib.import_module(name)
    survivors: list[str] = []
    sound: set[str] = set()
    said = ""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        copied(root)
        with tqdm(mutants, desc="mutants") as progress:
            for tried, mutant in enumerate(progress, 1):
                tests = MIRRORED[mutant.file]
                if tests not in sound and not passes(root / "tests" / tests, root, arguments.timeout):
                    parser.error(f"tests/{tests} fails, or takes more than {arguments.timeout} s, without any change")
                sound.add(tests)
                if not caught(mutant, root, arguments.timeout):
                    survivors.append(str(mutant))
                    progress.write(f"survives: {mutant}")
                said = report(len(mutants), tried, survivors, arguments.output)
    print(said)


if __name__ == "__main__":
    main()
