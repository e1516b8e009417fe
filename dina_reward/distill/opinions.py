"""What all judges together say about pairs: one probability, and one score per side where all of them score."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dina_reward.data.cache_writer import LatentPair
from dina_reward.distill.judges import Answer, JudgeError
from dina_reward.distill.ledger import Question
from dina_reward.distill.selection import Selection
from dina_reward.distill.soft_labels import JudgeScale


SCORE_SPREAD = 2.0
"""Deviation of the scores that regression aims at: under the published variance such a gap is P = .99 at level .4."""


@dataclass(frozen=True)
class JudgeOpinion:
    """Answers of one judge.

    Args:
        weight: of the judge; those of all judges sum to one.
        answers: scores by sample, or probabilities by pair.
        scale: how far they can be believed.
    """

    weight: float
    answers: Mapping[Question, Answer]
    scale: JudgeScale

    def probability(self, pair: tuple[int, int], tie_margin: float) -> float | None:
        """``P(first > second)``; None without an opinion."""
        verdict = self.answers.get(pair)
        if verdict is not None:
            return self.scale.softened(verdict)
        first, second = (self.answers.get(side) for side in pair)
        if first is None or second is None:
            return None
        return self.scale.probability(first - second, tie_margin)


def label_pairs(
    selection: Selection,
    prompts: Sequence[str],
    opinions: Sequence[JudgeOpinion],
    tie_margin: float = 0.0,
    *,
    asked_only: bool = False,
) -> list[LatentPair]:
    """Preferences between the judged samples of each prompt; the likelier side is the chosen one, ties have ``p = 1/2``.

    Args:
        selection: groups of samples, and the pairs that judges of pairs may have been asked about.
        prompts: of all samples.
        opinions: of the judges.
        tie_margin: score gaps up to this are ties.
        asked_only: no judge scores, so pairs that nobody was asked about have no label.

    Raises:
        JudgeError: no judge has an opinion of any pair, or all pairs are ties.
    """
    asked = {question for each in opinions for question in each.answers}
    pairs = []
    for number, group in enumerate(selection.groups):
        for pair in itertools.combinations(group, 2):
            known = [(each.weight, each.probability(pair, tie_margin)) for each in opinions]
            heard = [(weight, p) for weight, p in known if p is not None and weight > 0]
            if not heard or (asked_only and pair not in asked):
                continue
            p = sum(weight * value for weight, value in heard) / sum(weight for weight, _ in heard)
            p = 0.5 if abs(p - 0.5) < 1e-9 else p
            scores = _scores(pair, opinions)
            better, worse = pair if p >= 0.5 else pair[::-1]
            given = None if scores is None else (scores[better], scores[worse])
            label = max(p, 1 - p)
            pairs.append(LatentPair(prompts[better], better, worse, label, group=f"group {number}", scores=given))
    if not pairs or all(pair.p_chosen == 0.5 for pair in pairs):
        what = "has an opinion of no pair" if not pairs else f"finds all {len(pairs)} pairs equal"
        raise JudgeError(f"the judge {what}, so there is nothing to learn; check what it returns for your samples")
    return pairs


def _scores(pair: tuple[int, int], opinions: Sequence[JudgeOpinion]) -> dict[int, float] | None:
    """Weighted standardised scores of both sides, in units of `SCORE_SPREAD`, where every judge scored both."""
    result: dict[int, float] = {}
    for side in pair:
        total = 0.0
        for each in opinions:
            value = each.answers.get(side)
            if value is None:
                return None
            total += each.weight * each.scale.standardized(value)
        result[side] = SCORE_SPREAD * total
    return result
