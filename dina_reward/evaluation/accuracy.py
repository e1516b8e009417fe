"""Pairwise accuracy, with the treatment of ties spelled out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dina_reward.evaluation.pair_scores import PairScores


@dataclass(frozen=True)
class TieConvention:
    """Credit that a pair earns when its label or its prediction is a tie.

    Args:
        name: name to report with the number.
        target_tie: credit when only the label is a tie; ``None`` leaves such pairs out.
        predicted_tie: credit when only the prediction is a tie.
        both: credit when both are ties; ``None`` leaves such pairs out.
        per_ranking: average within each ranking first, then over rankings (where pairs come with their rankings).
        tuned_threshold: the convention chooses, on other pairs, how close two scores have to be for a predicted tie.
    """

    name: str
    target_tie: float | None
    predicted_tie: float
    both: float | None
    per_ranking: bool = False
    tuned_threshold: bool = False

    @classmethod
    def named(cls, ties: str | TieConvention) -> TieConvention:
        """The convention of a name in `TIE_CONVENTIONS`; a convention is returned as it is.

        Raises:
            ValueError: unknown name.
        """
        if isinstance(ties, TieConvention):
            return ties
        if not isinstance(ties, str) or ties not in TIE_CONVENTIONS:
            raise ValueError(f"unknown tie convention {ties!r}; choose one of {', '.join(TIE_CONVENTIONS)}")
        return TIE_CONVENTIONS[ties]


TIE_CONVENTIONS = {
    convention.name: convention
    for convention in (
        TieConvention("half", target_tie=None, predicted_tie=0.5, both=None),
        TieConvention("imagereward", target_tie=None, predicted_tie=0.0, both=None),
        TieConvention("hpdv2", target_tie=1.0, predicted_tie=1.0, both=1.0, per_ranking=True),
        TieConvention("pickscore", target_tie=0.5, predicted_tie=0.5, both=1.0, tuned_threshold=True),
        TieConvention("dina_lrm", target_tie=0.0, predicted_tie=0.0, both=0.0),
    )
}
"""Conventions of published benchmarks: ``half`` (the default here) drops tied labels and gives a tied prediction one half;
``imagereward`` drops tied labels and counts tied predictions as wrong (arXiv 2304.05977); ``hpdv2`` is the mean over
rankings of ``1 - inversions / C(n, 2)``, so that a tie on either side is correct (arXiv 2306.09341); ``pickscore`` gives one
half for a tie on one side and tunes the threshold of a predicted tie (arXiv 2305.01569); ``dina_lrm`` counts ties as wrong,
as the evaluator of arXiv 2602.11146 does."""

BENCHMARK_TIES = {
    "hpdv2": "hpdv2",
    "hpdv3": "half",
    "pickapic": "pickscore",
    "imagereward": "imagereward",
    "imagereward_benchmark": "imagereward",
    "genai_bench": "half",
    "videogen_rewardbench": "half",
    "rapidata": "half",
    "trl": "half",
    "reference_latents": "dina_lrm",
}
"""The tie convention that goes with each schema of `dina_reward.data.read_preferences`."""


@dataclass(frozen=True)
class Accuracy:
    """Pairwise accuracy and what went into it.

    Args:
        value: accuracy in ``[0, 1]``; NaN when no pair counts.
        counted: pairs that count under the convention.
        pairs: all pairs.
        target_ties: pairs whose label is a tie (``p_chosen = 0.5``).
        predicted_ties: pairs whose scores are equal, or closer than the threshold.
        convention: name of the tie convention.
        tie_threshold: margins of at most this size are predicted ties.
        rankings: rankings that were averaged over, for a convention that does so.
        interval: bootstrap confidence interval, where one was computed.
    """

    value: float
    counted: int
    pairs: int
    target_ties: int
    predicted_ties: int
    convention: str
    tie_threshold: float = 0.0
    rankings: int | None = None
    interval: tuple[float, float] | None = None

    @property
    def standard_error(self) -> float:
        """Binomial standard error of ``value``."""
        return (self.value * (1 - self.value) / self.counted) ** 0.5 if self.counted else float("nan")


def pair_credit(
    margins: Tensor, p_chosen: Tensor, ties: str | TieConvention = "half", tie_threshold: float = 0.0
) -> Tensor:
    """What each pair adds to the accuracy: shape ``(pairs,)``, float64, NaN for pairs that the convention leaves out.

    Arguments and errors as for `pairwise_accuracy`.
    """
    convention = TieConvention.named(ties)
    if margins.ndim != 1 or margins.shape != p_chosen.shape:
        raise ValueError(f"margins {tuple(margins.shape)} and p_chosen {tuple(p_chosen.shape)} must both be (pairs,)")
    if bool(margins.isnan().any()):
        raise ValueError("margins hold NaN; the scores they come from are not usable")
    if tie_threshold < 0:
        raise ValueError(f"tie_threshold must not be negative, got {tie_threshold}")
    target_tie, predicted_tie = p_chosen == 0.5, margins.abs() <= tie_threshold
    credit = ((margins > 0) == (p_chosen > 0.5)).double()
    for case, value in (
        (target_tie & ~predicted_tie, convention.target_tie),
        (~target_tie & predicted_tie, convention.predicted_tie),
        (target_tie & predicted_tie, convention.both),
    ):
        credit[case] = float("nan") if value is None else value
    return credit


def pairwise_accuracy(
    margins: Tensor,
    p_chosen: Tensor | None = None,
    *,
    ties: str | TieConvention = "half",
    tie_threshold: float = 0.0,
    rankings: Sequence[object] | None = None,
) -> Accuracy:
    """Share of pairs that the sign of the margin orders as the label does.

    Args:
        margins (`Tensor`): chosen minus rejected score, shape ``(pairs,)``.
        p_chosen (`Tensor`, *optional*): labels in ``[0, 1]``, shape ``(pairs,)``; below 0.5 the other side is preferred.
        ties: name of a convention in `TIE_CONVENTIONS`, or one of your own.
        tie_threshold: margins of at most this size are predicted ties.
        rankings: id of the ranking of each pair. With them, a convention that averages over rankings (``hpdv2``) does so;
            without, and under all other conventions, every pair counts alike.

    Raises:
        ValueError: shapes differ, a margin is NaN, or the convention is unknown.
    """
    convention = TieConvention.named(ties)
    p_chosen = torch.ones_like(margins) if p_chosen is None else p_chosen.to(margins)
    credit = pair_credit(margins, p_chosen, convention, tie_threshold)
    if rankings is not None and len(rankings) != len(credit):
        raise ValueError(f"got {len(rankings)} rankings for {len(credit)} pairs; give the ranking of each pair")
    counts = ~credit.isnan()
    result = Accuracy(
        value=float(credit.nanmean()) if bool(counts.any()) else float("nan"),
        counted=int(counts.sum()),
        pairs=len(margins),
        target_ties=int((p_chosen == 0.5).sum()),
        predicted_ties=int((margins.abs() <= tie_threshold).sum()),
        convention=convention.name,
        tie_threshold=tie_threshold,
    )
    if rankings is None or not convention.per_ranking or not result.counted:
        return result
    counted = [ranking for ranking, counts_here in zip(rankings, counts.tolist(), strict=True) if counts_here]
    weights = ranking_weights(counted)
    value = float((credit[counts] * weights).sum() / weights.sum())
    return replace(result, value=value, rankings=len(set(counted)))


def ranking_weights(rankings: Sequence[object]) -> Tensor:
    """One over the number of pairs in each pair's ranking, shape ``(pairs,)``, float64: every ranking weighs the same."""
    index = {ranking: number for number, ranking in enumerate(dict.fromkeys(rankings))}
    rows = torch.tensor([index[ranking] for ranking in rankings], dtype=torch.long)
    return 1 / torch.bincount(rows, minlength=len(index)).double()[rows]


def accuracy_by_noise(scores: PairScores, *, ties: str | TieConvention = "half") -> dict[str, Accuracy]:
    """Pairwise accuracy of every setting: each noise level, and ``"ensemble"``."""
    return {
        setting: pairwise_accuracy(scores.margins[:, column], scores.p_chosen, ties=ties)
        for column, setting in enumerate(scores.protocol.settings)
    }
