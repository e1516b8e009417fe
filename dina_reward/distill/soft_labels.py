"""From a judge's answers to probabilities: a temperature for scores, a rate of slips for verdicts, both fitted to repeats.

A judge that contradicts itself makes soft labels. One that never does may still be wrong, as programs are that give the same
picture the same score: then small gaps are soft and large ones hard.

    scores:   P(a > b) = Phi((y_a - y_b) / T), equal scores 1/2
    verdicts: P(a > b) = (1 - e) p + e (1 - p)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, pstdev
from typing import Any

import torch

from dina_reward.distill.judges import Answer, JudgeKind
from dina_reward.likelihood import log_ndtr


SHARPEST = 1e-3
"""Smallest temperature, in deviations of the judge's scores: labels are then certain unless scores are equal."""

CONSISTENT = 0.5
"""Temperature of a judge that never contradicts itself, in median gaps of a group: the usual pair gets P = Phi(2) = .98."""


@dataclass(frozen=True)
class JudgeScale:
    """What is known of a judge's answers; of a later round that of the first one is used, so that scores mean the same.

    Args:
        mean, std: of its scores; 0 and 1 for a judge of pairs.
        temperature: ``T``, in the units of its scores.
        slips: ``e``, share of verdicts that it would not repeat.
        repeats: questions that it was asked twice.
        agreement: share of them (of pairs of them, for scores) that it ordered the same way twice; NaN without any.
    """

    mean: float = 0.0
    std: float = 1.0
    temperature: float = 0.0
    slips: float = 0.0
    repeats: int = 0
    agreement: float = math.nan

    def probability(self, gap: float, tie_margin: float = 0.0) -> float:
        """``P(a > b)`` of a score gap; a tie is one half."""
        if abs(gap) <= tie_margin:
            return 0.5
        sharpest = max(self.temperature, SHARPEST * self.std)
        return float(torch.special.ndtr(torch.tensor(gap / sharpest, dtype=torch.float64)))

    def softened(self, verdict: float) -> float:
        """``P(a > b)`` of a verdict."""
        return (1 - self.slips) * verdict + self.slips * (1 - verdict)

    def standardized(self, score: float) -> float:
        """A score in deviations from the mean."""
        return (score - self.mean) / self.std

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> JudgeScale:
        """Inverse of `dataclasses.asdict` through JSON, where NaN is null."""
        known: dict[str, Any] = {name: math.nan if value is None else value for name, value in values.items()}
        return cls(**known)


def fit_scale(
    kind: JudgeKind,
    answers: Mapping[Any, Answer],
    repeated: Mapping[Any, Answer],
    groups: Sequence[Sequence[int]],
    temperature: float | None = None,
) -> JudgeScale:
    """Scale of a judge from what it answered first and what it answered when asked again.

    Args:
        kind: what it answers.
        answers: by sample, or by pair.
        repeated: second answers to some of the same questions; of pairs, with the sides exchanged and turned back.
        groups: samples that share a prompt; only those are compared.
        temperature: use this one instead of fitting.

    A temperature is fitted to repeats. If they never contradict the first answers, or there are none, it is at least
    `CONSISTENT` median gaps.
    """
    if kind == "pairs":
        return _verdict_scale(answers, repeated)
    scores = [value for value in answers.values() if value is not None]
    if not scores:
        return JudgeScale()
    mean, std = fmean(scores), pstdev(scores) or 1.0
    first, second = _gaps(answers, repeated, groups)
    decided = [(a, b) for a, b in zip(first, second, strict=True) if a and b]
    agreement = fmean((a > 0) == (b > 0) for a, b in decided) if decided else math.nan
    if temperature is None:
        temperature = fit_temperature(first, second, std) if first else SHARPEST * std
        if not agreement < 1:
            temperature = max(temperature, CONSISTENT * _median_gap(answers, groups))
    return JudgeScale(mean, std, temperature, 0.0, len(repeated), agreement)


def _median_gap(answers: Mapping[Any, Answer], groups: Sequence[Sequence[int]]) -> float:
    """Of unequal scores inside a group; 0 without any."""
    gaps = []
    for group in groups:
        scores = [value for sample in group if (value := answers.get(sample)) is not None]
        gaps += [abs(a - b) for a, b in itertools.combinations(scores, 2) if a != b]
    return median(gaps) if gaps else 0.0


def fit_temperature(first: Sequence[float], second: Sequence[float], std: float) -> float:
    """The ``T`` under which first gaps predict the order of the second ones best, between .001 and 10 deviations.

    Least mean of ``-q log Phi(g/T) - (1 - q) log Phi(-g/T)`` with ``q`` 1, 0 or 1/2 by the sign of the second gap, over a
    grid of 200 temperatures; the largest of equally good ones.

    Args:
        first, second: score gaps of the same pairs, judged twice.
        std: deviation of the judge's scores.
    """
    gaps = torch.tensor(list(first), dtype=torch.float64)
    labels = (torch.tensor(list(second), dtype=torch.float64).sign() + 1) / 2
    grid = std * torch.logspace(math.log10(SHARPEST), 1, 200, dtype=torch.float64)
    z = gaps[None] / grid[:, None]
    losses = -(labels * log_ndtr(z) + (1 - labels) * log_ndtr(-z)).mean(dim=1)
    best = losses <= losses.min() + 1e-12
    return float(grid[best].max())


def _verdict_scale(answers: Mapping[Any, Answer], repeated: Mapping[Any, Answer]) -> JudgeScale:
    twice = [(answers.get(pair), second) for pair, second in repeated.items()]
    decided = [(a, b) for a, b in twice if a is not None and b is not None and a != 0.5 and b != 0.5]
    if not decided:
        return JudgeScale(repeats=len(repeated))
    differ = fmean((a > 0.5) != (b > 0.5) for a, b in decided)
    # Two verdicts with slips e differ with probability 2 e (1 - e).
    slips = (1 - math.sqrt(max(0.0, 1 - 2 * differ))) / 2
    return JudgeScale(slips=slips, repeats=len(repeated), agreement=1 - differ)


def _gaps(
    answers: Mapping[Any, Answer], repeated: Mapping[Any, Answer], groups: Sequence[Sequence[int]]
) -> tuple[list[float], list[float]]:
    """Score gaps of pairs within groups, by first and by second answers, where both sides have both."""
    first, second = [], []
    for group in groups:
        known = [s for s in group if answers.get(s) is not None and repeated.get(s) is not None]
        for place, a in enumerate(known):
            for b in known[place + 1 :]:
                first.append(float(answers[a]) - float(answers[b]))  # type: ignore[arg-type]
                second.append(float(repeated[a]) - float(repeated[b]))  # type: ignore[arg-type]
    return first, second
