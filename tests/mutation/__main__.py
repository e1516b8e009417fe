"""Which mutants of the mathematics the mirrored tests do not notice.

    python -m tests.mutation --sample 200 --output survivors.json     # or --file likelihood.py, --file ...
    python -m tests.mutation --again survivors.json --output survivors.json    # its survivors, after tests were written

Every mutant is a copy of the package with one operator, comparison, sign or constant changed (`tests.mutation.mutants`). It
is caught if a mirrored test fails, or computes far longer than without the change. The score is the share that is caught.
Tests that fail without any change would catch everything, so each is first run so, and once more at the end in the order
that was used. Mutants that no input can tell from the original are named in `equivalent.json` with the reason; the report
names them too, and they count neither way. The report is written after every mutant: a run that is cut short leaves the
score of what it tried, and the same command goes on with the rest of the sample. Runs on Linux and macOS.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tests.mutation.mutants import MIRRORED, Mutant, mutants_of
from tests.mutation.running import Run, run_tests


ROOT = Path(__file__).parents[2]
_SLOW, _FIRST = "caught by computing too long", "caught at first"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
WARM = ("hypothesis", "datasets", "dina_reward.reward", "dina_reward.alignment.policy", "tests.tiny_models")
"""Imported before the processes of the tests are forked, which import the package and its tests anew, but nothing else."""


class Tests:
    """The mirrored tests, in a copy of the repository at ``root``.

    Those that caught a mutant before are run first. A mutant may take five times the computing time of the original, and
    ten seconds.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._limits: dict[str, int] = {}
        self._caught: dict[str, list[str]] = {}

    def try_out(self, mutant: Mutant) -> Run:
        """Runs the tests that mirror a mutant's file on the mutant."""
        tests = MIRRORED[mutant.file]
        if tests not in self._limits:
            self._limits[tests] = int(5 * self._sound(tests).seconds) + 10
        target = self._root / "dina_reward" / mutant.file
        before = target.read_text(encoding="utf-8")
        target.write_text(mutant.text, encoding="utf-8")
        try:
            run = self._run(tests, self._limits[tests])
        finally:
            target.write_text(before, encoding="utf-8")
        if run.failed:
            caught = self._caught.setdefault(tests, [])
            self._caught[tests] = [run.failed, *(name for name in caught if name != run.failed)]
        return run

    def check_orders(self) -> None:
        """Tests must pass in the order that was used, too, or the order has caught mutants."""
        for tests in self._caught:
            self._sound(tests)

    def _sound(self, tests: str) -> Run:
        run = self._run(tests, 1800)
        if not run.passed:
            raise SystemExit(f"tests/{tests} fails without any change: {run}")
        return run

    def _run(self, tests: str, seconds: int) -> Run:
        return run_tests(self._root / "tests" / tests, self._root, seconds, self._caught.get(tests, []))


def drawn(mutants: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """A random sample by the digests of the mutants, so that a change elsewhere leaves most of it as it is."""

    def digest(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{seed}\n{mutant.file}\n{mutant.old}\n{mutant.new}".encode()).digest()

    return sorted(mutants, key=digest)[:count]


def named(mutants: list[Mutant], names: set[str], source: Path) -> list[Mutant]:
    """The mutants of these names, all of which must exist."""
    found = [mutant for mutant in mutants if str(mutant) in names]
    if missing := names - {str(mutant) for mutant in found}:
        raise SystemExit(f"{source} names mutants that there are not (any more): {sorted(missing)}")
    return found


def copied(root: Path) -> None:
    """Copies what the tests need."""
    for part in ("dina_reward", "tests", "recipes", "examples"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)


class Report:
    """The score of the mutants that were tried, which goes on from an earlier report's where there is one.

    What was caught before tests were written for survivors stays beside it: it tells what to expect of other mutants.
    """

    def __init__(
        self, drawn: int, reasons: dict[str, str], earlier: dict[str, Any] | None = None, again: bool = False
    ) -> None:
        self._again = again
        earlier = earlier or {"drawn": drawn, "caught": 0, _FIRST: 0, _SLOW: 0, "survivors": [], "equivalent": {}}
        self._first = earlier[_FIRST]
        self._reasons = reasons
        self._drawn, self._caught, self._slow = (earlier[key] for key in ("drawn", "caught", _SLOW))
        self._survivors = {name for name in earlier["survivors"] if name not in reasons}
        self._equivalent = {*earlier["equivalent"], *(name for name in earlier["survivors"] if name in reasons)}

    def add(self, mutant: Mutant, run: Run) -> None:
        name = str(mutant)
        self._survivors.discard(name)
        if name in self._reasons:
            self._equivalent.add(name)
        elif run.noticed:
            self._caught += 1
            self._first += not self._again
            self._slow += run.too_long
        else:
            self._survivors.add(name)

    def write(self, output: Path) -> str:
        """Writes the report, and returns the score in words."""
        counted = self._caught + len(self._survivors)
        figures = {
            "drawn": self._drawn,
            "tried": counted + len(self._equivalent),
            "score": round(self._caught / max(1, counted), 4),
            "caught": self._caught,
            _FIRST: self._first,
            _SLOW: self._slow,
            "survivors": sorted(self._survivors),
            "equivalent": {name: self._reasons[name] for name in sorted(self._equivalent)},
        }
        output.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return (
            f"{self._caught} of {counted} mutants caught ({figures['score']:.1%}), {len(self._equivalent)} more are "
            f"equivalent; see {output}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation score of the mathematics.")
    parser.add_argument("--file", action="append", choices=sorted(MIRRORED), help="these files alone")
    parser.add_argument("--sample", type=int, default=200, help="so many mutants, drawn at random; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--again", type=Path, help="an earlier report, whose survivors are tried")
    parser.add_argument("--output", type=Path, default=Path("survivors.json"), help="score and survivors")
    arguments = parser.parse_args()
    mutants = [mutant for file in MIRRORED for mutant in mutants_of(ROOT / "dina_reward", file)]
    reasons = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    named(mutants, set(reasons), EQUIVALENT)
    earlier = None
    if arguments.again is not None:
        earlier = json.loads(arguments.again.read_text(encoding="utf-8"))
        mutants = named(mutants, set(earlier["survivors"]) - set(reasons), arguments.again)
    if arguments.file:
        mutants = [mutant for mutant in mutants if mutant.file in arguments.file]
    if arguments.again is None:
        if 0 < arguments.sample < len(mutants):
            mutants = drawn(mutants, arguments.sample, arguments.seed)
        if arguments.output.is_file():
            earlier = json.loads(arguments.output.read_text(encoding="utf-8"))
            if earlier["drawn"] != len(mutants):
                raise SystemExit(f"{arguments.output} is of another sample; name another file")
            mutants = mutants[earlier["tried"] :]
    for name in WARM:
        importlib.import_module(name)
    report = Report(len(mutants), reasons, earlier, again=arguments.again is not None)
    said = report.write(arguments.output)
    with tempfile.TemporaryDirectory() as directory:
        copied(Path(directory))
        tests = Tests(Path(directory))
        with tqdm(mutants, desc="mutants") as progress:
            for mutant in progress:
                run = tests.try_out(mutant)
                report.add(mutant, run)
                if not run.noticed:
                    progress.write(f"survives: {mutant}")
                said = report.write(arguments.output)
        tests.check_orders()
    print(said)


if __name__ == "__main__":
    main()
