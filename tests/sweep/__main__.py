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
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.sweep.kinds import ANYWHERE, variants
from tests.sweep.target import Target, raised
from tests.sweep.targets import TARGETS
from tests.sweep.tools import TOOLS
from tests.sweep.wrapped import outcomes as wrapped_outcomes
from tests.sweep.wrapped import wrapped_table


RIGHT = "right"
WORDS = ("clear", "unclear", "accepted")
ALL = (*TARGETS, *TOOLS)
TABLE = Path(__file__).with_name("outcomes.md")


@dataclass(frozen=True)
class Outcome:
    """What one kind of value did as one argument."""

    target: str
    argument: str
    kind: str
    verdict: str
    message: str = ""


@dataclass(frozen=True)
class Case:
    """One kind of value as one argument, beside right ones for the others."""

    target: Target
    argument: str
    kind: str

    def given(self) -> dict[str, Any]:
        """The arguments, made anew."""
        names = [name for name in self.target.right if name != self.argument and name not in self.target.alone]
        others = {name: self.target.right[name]() for name in names}
        return {self.argument: values(self.target, self.argument)[self.kind], **others}

    def outcome(self) -> Outcome:
        """What comes of the call."""
        return Outcome(self.target.name, self.argument, self.kind, *verdict(self.target, self.given()))


def values(target: Target, argument: str) -> dict[str, Any]:
    """Everything that is tried as an argument, by kind; what is equal to the right value is left out."""
    right = target.right[argument]()
    made = {**{kind: make() for kind, make in ANYWHERE.items()}, **dict(variants(right))}
    return {RIGHT: right, **{kind: value for kind, value in made.items() if not same(value, right)}}


def cases(target: Target) -> list[Case]:
    """All wrong kinds for all arguments of a function."""
    found = []
    for argument in target.right:
        fine = {RIGHT, *target.fine.get(argument, frozenset())}
        found += [Case(target, argument, kind) for kind in values(target, argument) if kind not in fine]
    return found


def check_right(target: Target) -> None:
    """Calls a function with right arguments: one that refused these as well would refuse everything.

    Raises:
        RuntimeError: naming the argument.
    """
    for argument in target.right:
        word, message = verdict(target, Case(target, argument, RIGHT).given())
        if word != "accepted":
            raise RuntimeError(f"{target.name} does not take what is right as {argument}: {message}")


def same(value: Any, right: Any) -> bool:
    return type(value) is type(right) and isinstance(value, (str, int, float, bool)) and value == right


def verdict(target: Target, given: dict[str, Any]) -> tuple[str, str]:
    """The outcome of a call, and what it raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.call(**given)
    except Exception as error:
        return raised(error)
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
        for target in [target for target in ALL if only in target.name]:
            check_right(target)
            found = [case.outcome() for case in cases(target)]
            outcomes += found
            print(f"{target.name}: {dict(Counter(outcome.verdict for outcome in found))}", flush=True)
        page = table(outcomes)
        if not only:
            page += "\nWrapped pipelines:\n\n" + wrapped_table(wrapped_outcomes())
    print(page)
    if not only:
        TABLE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
