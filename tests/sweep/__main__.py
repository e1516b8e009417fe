"""What happens when each argument of the public functions gets each wrong kind of value.

    python -m tests.sweep                  # writes tests/sweep/outcomes.md
    python -m tests.sweep --only score

An outcome is *clear* if the package itself raises a `ValueError`, *unclear* if anything else comes out (an error of torch,
numpy or Python from the depth of a call), and *accepted* if nothing is raised although the kind is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dina_reward
from tests.sweep.kinds import ANYWHERE, variants
from tests.sweep.targets import TARGETS, Target


PACKAGE = str(Path(dina_reward.__file__).parent)
WORDS = ("clear", "unclear", "accepted")
TABLE = Path(__file__).with_name("outcomes.md")


@dataclass(frozen=True)
class Outcome:
    """What one kind of value did as one argument."""

    target: str
    argument: str
    kind: str
    verdict: str
    message: str = ""


def sweep(target: Target) -> Iterator[Outcome]:
    """All kinds for all arguments of a function."""
    for argument, make in target.right.items():
        others = {name: value for name, value in target.right.items() if name != argument and name not in target.alone}
        fine = target.fine.get(argument, frozenset())
        cases = [(kind, wrong()) for kind, wrong in ANYWHERE.items()] + list(variants(make()))
        for kind, value in cases:
            if kind not in fine and not same(value, make()):
                given = {argument: value, **{name: value() for name, value in others.items()}}
                yield Outcome(target.name, argument, kind, *verdict(target, given))


def same(value: Any, right: Any) -> bool:
    return type(value) is type(right) and isinstance(value, (str, int, float, bool)) and value == right


def verdict(target: Target, given: dict[str, Any]) -> tuple[str, str]:
    """The outcome of a call, and what it raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.call(**given)
    except Exception as error:
        raised_by = traceback.extract_tb(error.__traceback__)[-1].filename
        own = isinstance(error, ValueError) and raised_by.startswith(PACKAGE)
        return (
            "clear" if own else "unclear",
            f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}",
        )
    return "accepted", ""


def table(outcomes: Iterable[Outcome]) -> str:
    """A page: counts by argument, then everything that is not clear."""
    outcomes = list(outcomes)
    counts: dict[tuple[str, str], Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault((outcome.target, outcome.argument), Counter())[outcome.verdict] += 1
    total = Counter(outcome.verdict for outcome in outcomes)
    lines = [
        "# Outcomes of wrong arguments", "", "Written by `python -m tests.sweep`, which says what the words mean.", "",
        f"{len(outcomes)} cases: {', '.join(f'{total[word]} {word}' for word in WORDS)}.",
        "", "| function | argument | clear | unclear | accepted |", "|---|---|---:|---:|---:|",
    ]  # fmt: skip
    for (target, argument), count in counts.items():
        lines.append(f"| {target} | {argument} | {count['clear']} | {count['unclear']} | {count['accepted']} |")
    others = [outcome for outcome in outcomes if outcome.verdict != "clear"]
    if others:
        lines += ["", "| function | argument | kind | outcome | |", "|---|---|---|---|---|"]
        lines += [f"| {o.target} | {o.argument} | {o.kind} | {o.verdict} | {escaped(o.message)} |" for o in others]
    return "\n".join(lines) + "\n"


def escaped(message: str) -> str:
    return message.replace("|", "\\|").encode("ascii", "backslashreplace").decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default="", help="functions whose name holds this text; nothing is written")
    only = parser.parse_args().only
    outcomes: list[Outcome] = []
    with open(os.devnull, "w") as silence, contextlib.redirect_stderr(silence):
        for target in [target for target in TARGETS if only in target.name]:
            found = list(sweep(target))
            outcomes += found
            print(f"{target.name}: {dict(Counter(outcome.verdict for outcome in found))}", flush=True)
    page = table(outcomes)
    print(page)
    if not only:
        TABLE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
