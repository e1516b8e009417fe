"""What a judge is: any callable on images or latents that scores samples, or says which of two is the better one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Thread
from typing import Any, Literal

from torch import Tensor

from dina_reward.checks.values import check_number, fits
from dina_reward.reward_functions import (
    RewardError,
    call_reward,
    call_scorer,
    callable_name,
    check_synchronous,
    parameter_names,
    reward_list,
    unique_names,
)


JudgeKind = Literal["scores", "pairs"]
Answer = float | None
"""A score, or the probability that the first side is preferred; None where the judge has no opinion."""

_VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}


class JudgeError(ValueError):
    """A judge failed, answered something that cannot be used, or would cost more than allowed; what it has said is kept."""


@dataclass(frozen=True)
class JudgeBatch:
    """What a judge is asked in one call.

    Args:
        prompts: one per row.
        columns: arguments by name: ``latents`` and ``images``, or of a judge of pairs ``latents_a``, ``latents_b``,
            ``images_a`` and ``images_b``; tensors of ``len(prompts)`` rows. Images lie in [0, 1].
    """

    prompts: Sequence[str]
    columns: Mapping[str, Tensor]

    def arguments(self) -> dict[str, Any]:
        """Everything by name."""
        return {"prompts": list(self.prompts), **self.columns}


class Judge(ABC):
    """Scores samples (``kind = "scores"``) or compares two (``kind = "pairs"``).

    Args:
        name: in files, logs and tables.
        kind: what it answers.
        needs_images: whether latents are decoded for it.
    """

    def __init__(self, name: str, kind: JudgeKind, needs_images: bool) -> None:
        self.name, self.kind, self.needs_images = name, kind, needs_images

    @abstractmethod
    def ask(self, batch: JudgeBatch) -> list[Answer]:
        """One answer per row.

        Raises:
            JudgeError: it failed, or its answers cannot be used.
        """

    @property
    def spent(self) -> float:
        """What it says to have cost so far, in the currency of its prices."""
        return 0.0

    def identity(self) -> dict[str, Any]:
        """What of it decides its answers, as JSON has it."""
        return {"name": self.name, "kind": self.kind}


class CallableJudge(Judge):
    """A Python callable, called by keyword with those of the arguments that its signature names.

    One that names ``images`` or ``latents`` (and ``prompts``) scores samples: it returns a finite number for each. One that
    names ``images_a`` and ``images_b``, or ``latents_a`` and ``latents_b``, compares two: it returns the probability that
    the first is better, or True or False, or ``"a"``, ``"b"`` or ``"tie"``.

    ``None`` says that it has no opinion.

    Args:
        function: the callable.
        timeout: seconds after which a call counts as failed; its thread is left to itself, since Python cannot stop it.

    Raises:
        ValueError: it is async, names neither samples nor sides, or the timeout is no number of seconds.
    """

    def __init__(self, function: Callable[..., Any], timeout: float | None = None, name: str | None = None) -> None:
        (self.function,) = reward_list(function, "judge")
        check_synchronous(function)
        if timeout is not None:
            check_number("timeout", timeout, 1e-3, _LONGEST_SECONDS)
        self.timeout = timeout
        names = parameter_names(function)
        named = {each: each in names for each in (*_SIDES, *_SAMPLES)}
        pairs = any(named[each] for each in _SIDES)
        if pairs and any(named[each] for each in _SAMPLES):
            raise ValueError(f"{callable_name(function)} names both samples and sides; it can only judge one of them")
        if not any(named.values()):
            raise ValueError(
                f"{callable_name(function)} names neither images nor latents, so it has nothing to judge; write it as "
                "`def judge(images, prompts)` or `def judge(images_a, images_b, prompts)`"
            )
        needs_images = any(value for each, value in named.items() if each.startswith("images"))
        super().__init__(name or callable_name(function), "pairs" if pairs else "scores", needs_images)

    def ask(self, batch: JudgeBatch) -> list[Answer]:
        """Calls the function; see `Judge.ask`."""
        available, count = batch.arguments(), len(batch.prompts)
        try:
            if self.kind == "pairs":
                return checked_verdicts(self.name, self._within_time(call_reward, available, count), count)
            scores = self._within_time(call_scorer, available, count)
        except TimeoutError:
            raise JudgeError(f"the judge {self.name} gave no answer within {self.timeout:g} s") from None
        except RewardError as error:
            raise JudgeError(f"the judge {error}") from error
        return [None if math.isnan(value) else value for value in scores.tolist()]

    def _within_time(self, call: Callable[..., Any], available: dict[str, Any], count: int) -> Any:
        if self.timeout is None:
            return call(self.function, available, count)
        outcome: Queue[tuple[Any, Exception | None]] = Queue()

        def run() -> None:
            try:
                outcome.put((call(self.function, available, count), None))
            except Exception as error:
                outcome.put((None, error))

        Thread(target=run, daemon=True).start()  # a daemon, so that a judge that hangs does not hold the process
        try:
            result, error = outcome.get(timeout=self.timeout)
        except Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return result


_LONGEST_SECONDS = 1e6  # eleven days; what threads can wait for has an end
_SAMPLES = ("images", "latents")
_SIDES = ("images_a", "images_b", "latents_a", "latents_b")


def checked_verdicts(name: str, result: Any, count: int) -> list[Answer]:
    """Probabilities that the first side is better.

    Raises:
        JudgeError: not one probability, truth value, ``"a"``, ``"b"``, ``"tie"`` or None per pair.
    """
    values = [None] * count if result is None else result
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)) or len(values) != count:
        found = f"{len(values)} answers" if isinstance(values, (list, tuple)) else type(values).__name__
        raise JudgeError(f"the judge {name} returned {found} for {count} pairs; expected one per pair")
    answers: list[Answer] = []
    for row, value in enumerate(values):
        value = _VERDICTS.get(value.strip().lower(), value) if isinstance(value, str) else value
        number = float(value) if isinstance(value, bool) or fits(value, float) else None
        if value is not None and (number is None or not 0 <= number <= 1):
            raise JudgeError(
                f"the judge {name} returned {value!r} for pair {row} of {count}; expected the probability that the first "
                "side is better, True or False, 'a', 'b', 'tie', or None"
            )
        answers.append(number)
    return answers


def checked_answers(judge: Judge, values: Any, prompts: Sequence[str]) -> list[Answer]:
    """Answers of a judge that is no Python callable.

    Raises:
        JudgeError: another number of answers than of prompts, or one that is not finite.
    """
    if judge.kind == "pairs":
        return checked_verdicts(judge.name, values, len(prompts))
    if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
        found = f"{len(values)} scores" if isinstance(values, (list, tuple)) else type(values).__name__
        raise JudgeError(
            f"the judge {judge.name} returned {found} for {len(prompts)} samples; expected one per sample"
        )
    for row, value in enumerate(values):
        if value is not None and not fits(value, float):
            raise JudgeError(
                f"the judge {judge.name} returned {value!r} for sample {row} of {len(prompts)} (prompt {prompts[row]!r}); "
                "expected a finite number, or null where it has no opinion"
            )
    return [None if value is None else float(value) for value in values]


def as_judges(judge: Any, timeout: float | None = None) -> list[Judge]:
    """One judge or several, of which callables are wrapped, with names that differ.

    Raises:
        ValueError: something that is no judge.
    """
    given = list(judge) if isinstance(judge, (list, tuple)) else [judge]
    if not given:
        raise ValueError("no judge was given; name at least one")
    judges = [each if isinstance(each, Judge) else CallableJudge(each, timeout) for each in given]
    for each, name in zip(judges, unique_names([_Named(each.name) for each in judges]), strict=True):
        each.name = name
    return judges


class _Named:
    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self) -> None: ...


def judge_weights(weights: Sequence[float] | None, judges: Sequence[Judge]) -> list[float]:
    """One weight per judge, summing to one.

    Raises:
        ValueError: another number of weights, or weights that are negative or all zero.
    """
    given = [1.0] * len(judges) if weights is None else weights
    if (
        not isinstance(given, (list, tuple))
        or len(given) != len(judges)
        or not all(fits(w, float) and w >= 0 for w in given)
        or sum(given) <= 0
    ):
        raise ValueError(
            f"judge weights must be {len(judges)} numbers, one per judge, not negative and not all 0, got {given!r:.80}"
        )
    return [float(weight) / sum(given) for weight in given]
