"""What judges have said: one file for every call, whole or absent, so that no answer is ever asked for twice or lost.

``judgements/JUDGE/NNNNNN.json`` holds the questions (numbers of samples, or pairs of them), the answers, the training step
the samples are of, the seconds that the call took and what it cost.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.checks.stored import read_json
from dina_reward.checks.values import check_fields
from dina_reward.distill.judges import Answer, Judge, JudgeError


FOLDER = "judgements"
Question = int | tuple[int, int]
"""A sample, or a pair of samples."""

_FEW = {"scores": 16, "pairs": 32}
"""Equal answers that may be chance; of pairs, because their sides are in random order."""
_OTHER_SCALE = 20.0
_FEW_OF_A_CALL = 8


@dataclass(frozen=True)
class JudgeLimits:
    """How a judge is asked, and what it may cost.

    Args:
        batch_size: samples or pairs per call; samples of one prompt are asked about together.
        retries: further tries of a call that failed.
        retry_seconds: wait before the first of them; doubled each time.
        cost_per_call: price of one judged sample or pair, of a judge that does not know its own.
        max_cost: what the judgements of one labelling may cost in all.
    """

    batch_size: int = 16
    retries: int = 2
    retry_seconds: float = 1.0
    cost_per_call: float = 0.0
    max_cost: float | None = None

    def __post_init__(self) -> None:
        check_fields(
            self,
            batch_size=(1, 1_000_000),
            retries=(0, 1000),
            retry_seconds=(0, 3600),
            cost_per_call=(0, math.inf),
            max_cost=(0, math.inf),
        )


@dataclass
class Spent:
    """What the judges of one labelling have cost so far.

    Args:
        calls: judged samples and pairs.
        cost: in the currency of the prices.
        seconds: that they took.
    """

    calls: int = 0
    cost: float = 0.0
    seconds: float = 0.0


@dataclass
class JudgeLedger:
    """The answers of one judge.

    Args:
        directory: of the labelling.
        judge: whom to ask.
        limits: how.
        spent: by all judges of the labelling.
        on_call: told the number of questions of each new call.
    """

    directory: Path
    judge: Judge
    limits: JudgeLimits
    spent: Spent
    on_call: Callable[[int], Any] = lambda count: None
    _seen: list[list[float]] = field(default_factory=list)

    def ask(
        self, calls: Sequence[Sequence[Question]], ask: Callable[[Sequence[Question]], list[Answer]], step: int
    ) -> list[list[Answer]]:
        """Answers of all calls: those at hand are read, the others made.

        Args:
            calls: questions of each call.
            ask: makes one call.
            step: training step that the samples are of.

        Raises:
            JudgeError: a call failed for good, costs too much, or its answers cannot be meant; what came before is kept.
            ValueError: a file is damaged or of other questions.
        """
        answers = []
        for number, questions in enumerate(calls):
            path = self._path(number)
            known = path.is_file()
            record = self._read(path, questions) if known else self._make(ask, questions, step)
            if not known:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as staging:
                    staging.write_text(json.dumps(record) + "\n", encoding="utf-8")
                self.on_call(len(questions))
            self.spent.calls += len(questions)
            self.spent.cost += record["cost"]
            self.spent.seconds += record["seconds"]
            self._check_sense(number, record["answers"])
            answers.append(record["answers"])
        return answers

    def _path(self, number: int) -> Path:
        name = re.sub(r"[^\w.-]", "_", self.judge.name)
        return self.directory / FOLDER / name / f"{number:06d}.json"

    def _read(self, path: Path, questions: Sequence[Question]) -> dict[str, Any]:
        record = read_json(path)
        wanted = [list(question) if isinstance(question, tuple) else question for question in questions]
        if not isinstance(record, dict) or record.get("questions") != wanted:
            raise ValueError(f"{path} holds answers to other questions; label into another directory")
        return record

    def _make(
        self, ask: Callable[[Sequence[Question]], list[Answer]], questions: Sequence[Question], step: int
    ) -> dict[str, Any]:
        self._check_price(len(questions))
        before, started = self.judge.spent, time.perf_counter()
        answers = self._try(ask, questions)
        cost = self.judge.spent - before or self.limits.cost_per_call * len(questions)
        return {
            "judge": self.judge.name,
            "step": step,
            "questions": list(questions),
            "answers": answers,
            "seconds": round(time.perf_counter() - started, 6),
            "cost": cost,
        }

    def _try(self, ask: Callable[[Sequence[Question]], list[Answer]], questions: Sequence[Question]) -> list[Answer]:
        for attempt in range(self.limits.retries + 1):
            try:
                return ask(questions)
            except JudgeError as error:
                if attempt == self.limits.retries:
                    tries = f" (in {attempt + 1} tries)" if attempt else ""
                    raise JudgeError(f"{error}{tries}. {self._kept()}") from error
                time.sleep(self.limits.retry_seconds * 2**attempt)
        raise AssertionError

    def _check_price(self, count: int) -> None:
        most = self.limits.max_cost
        if most is None:
            return
        each = self.limits.cost_per_call or (self.spent.cost / self.spent.calls if self.spent.calls else 0.0)
        if self.spent.cost + each * count > most:
            raise JudgeError(
                f"the judge {self.judge.name} has cost {self.spent.cost:g}, and the next {count} answers would cost about "
                f"{each * count:g} more than max_cost {most:g} allows. Raise max_cost or lower the budget of calls; "
                f"{self._kept()}"
            )

    def _check_sense(self, number: int, answers: Sequence[Answer]) -> None:
        """Refuses answers that are all the same, or of another scale than those of earlier calls."""
        values = [value for value in answers if value is not None]
        if values:
            self._seen.append(values)
        everything = [value for call in self._seen for value in call]
        if len(everything) >= _FEW[self.judge.kind] and len(set(everything)) == 1:
            what = "scored" if self.judge.kind == "scores" else "judged"
            raise JudgeError(
                f"the judge {self.judge.name} {what} all of {len(everything)} {self.judge.kind} {everything[0]:g}, so "
                f"nothing can be learned from it. {self._kept()}"
            )
        if self.judge.kind == "scores" and len(values) >= _FEW_OF_A_CALL:
            self._check_scale(number, values)

    def _check_scale(self, number: int, values: Sequence[float]) -> None:
        before = [call for call in self._seen[:-1] if len(call) >= _FEW_OF_A_CALL]
        if not before:
            return
        low, high = min(map(min, before)), max(map(max, before))
        usual, here = median(max(call) - min(call) for call in before), max(values) - min(values)
        distance = max(low - min(values), max(values) - high, 0.0)
        larger = here > _OTHER_SCALE * (high - low) > 0 or distance > _OTHER_SCALE * (high - low) > 0
        smaller = 0 < here * _OTHER_SCALE < usual and max(values) * _OTHER_SCALE < high and min(values) >= 0 <= low
        if larger or smaller:
            raise JudgeError(
                f"the judge {self.judge.name} scored in [{min(values):g}, {max(values):g}] in call {number}, and in "
                f"[{low:g}, {high:g}] before: its scale differs from call to call. Make it score on one scale, or return "
                f"preferences of pairs. {self._kept()}"
            )

    def _kept(self) -> str:
        return f"The answers so far are kept in {self.directory / FOLDER}; the same call goes on from there"


def in_calls(groups: Sequence[Sequence[Question]], size: int) -> list[list[Question]]:
    """Questions in calls of at most ``size``; those of one group stay together where they fit."""
    calls: list[list[Question]] = [[]]
    for group in groups:
        if calls[-1] and len(calls[-1]) + len(group) > size:
            calls.append([])
        for question in group:
            if len(calls[-1]) == size:
                calls.append([])
            calls[-1].append(question)
    return [call for call in calls if call]


def by_question(calls: Sequence[Sequence[Question]], answers: Sequence[Sequence[Answer]]) -> Mapping[Question, Answer]:
    """Answers by question."""
    return {q: a for call, said in zip(calls, answers, strict=True) for q, a in zip(call, said, strict=True)}
