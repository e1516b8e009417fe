"""A sample of the sweep of wrong arguments, and what its committed table says of all of them."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from tests.sweep.__main__ import ALL, TABLE, cases, check_right
from tests.sweep.target import Target
from tests.sweep.targets import LOSS, NOISE
from tests.sweep.tools import PROTOCOL


SAMPLED = 150


def test_a_sample_of_wrong_arguments_is_refused() -> None:
    every = [case for target in ALL for case in cases(target)]
    outcomes = [case.outcome() for case in random.Random(0).sample(every, SAMPLED)]
    assert [outcome for outcome in outcomes if outcome.verdict == "accepted"] == []
    assert Counter(outcome.verdict for outcome in outcomes)["unclear"] <= 1


@pytest.mark.parametrize("target", [NOISE, LOSS, PROTOCOL], ids=lambda target: target.name)
def test_right_arguments_are_taken(target: Target) -> None:
    check_right(target)


def test_the_sweep_sees_what_accepts_everything_and_what_refuses_everything() -> None:
    indifferent = Target("indifferent", lambda number: None, {"number": lambda: 1})
    assert {case.outcome().verdict for case in cases(indifferent)} == {"accepted"}

    def refuse(number: int) -> None:
        raise ValueError(number)

    with pytest.raises(RuntimeError, match="refusing does not take what is right as number"):
        check_right(Target("refusing", refuse, {"number": lambda: 1}))
    assert {case.outcome().verdict for case in cases(Target("foreign", refuse, {"number": lambda: 1}))} == {"unclear"}


def test_the_table_has_nothing_accepted_and_little_unclear() -> None:
    page = TABLE.read_text(encoding="utf-8")
    counts = re.search(r"^(\d+) cases: (\d+) clear, (\d+) unclear, (\d+) accepted\.$", page, re.MULTILINE)
    assert counts is not None
    total, clear, unclear, accepted = map(int, counts.groups())
    assert total == clear + unclear
    assert accepted == 0
    assert unclear < total / 100
    # A target or argument that was added since would be missing.
    for target in ALL:
        for argument in {case.argument for case in cases(target)}:
            assert f"| {target.name} | {argument} |" in page
    verdicts = re.findall(r"^\| (?:reward|policy|search)[^|]* \| [^|]+ \| (right|clear|unclear|wrong) \|", page, re.M)
    assert len(verdicts) == 36
    assert set(verdicts) == {"right", "clear"}
