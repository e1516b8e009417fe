"""Pairwise accuracy, with the treatment of ties spelled out."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    name: str
    target_tie: float | None
    predicted_tie: float
    both: float | None


TIE_CONVENTIONS = {
    convention.name: convention
    for convention in (
        TieConvention("half", target_tie=None, predicted_tie=0.5, both=None),
        TieConvention("imagereward", target_tie=None, predicted_tie=0.0, both=None),
        TieConvention("hpdv2", target_tie=1.0, predicted_tie=1.0, both=1.0),
        TieConvention("pickscore", target_tie=0.5, predicted_tie=0.5, both=1.0),
        TieConvention("dina_lrm", target_tie=0.0, predicted_tie=0.0, both=0.0),
    )
}
"""Conventions of published benchmarks: ``half`` (the default here) drops tied labels and gives a tied prediction one half;
``imagereward`` drops tied labels and counts tied predictions as wrong; ``hpdv2`` counts a tie on either side as correct;
``pickscore`` gives one half for a tie on one side; ``dina_lrm`` counts tied labels as wrong."""


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
    """

    value: float
    counted: int
    pairs: int
    target_ties: int
    predicted_ties: int
    convention: str

    @property
    def standard_error(self) -> float:
        """Binomial standard error of ``value``."""
        return (self.value * (1 - self.value) / self.counted) ** 0.5 if self.counted else float("nan")


def pairwise_accuracy(
    margins: Tensor,
    p_chosen: Tensor | None = None,
    *,
    ties: str | TieConvention = "half",
    tie_threshold: float = 0.0,
) -> Accuracy:
    """Share of pairs that the sign of the margin orders as the label does.

    Args:
        margins (`Tensor`): chosen minus rejected score, shape ``(pairs,)``.
        p_chosen (`Tensor`, *optional*): labels in ``[0, 1]``, shape ``(pairs,)``; below 0.5 the other side is preferred.
        ties: name of a convention in `TIE_CONVENTIONS`, or one of your own.
        tie_threshold: margins of at most this size are predicted ties.

    Raises:
        ValueError: shapes differ, a margin is NaN, or the convention is unknown.
    """
    convention = _convention(ties)
    p_chosen = torch.ones_like(margins) if p_chosen is None else p_chosen.to(margins)
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
    counted = int((~credit.isnan()).sum())
    return Accuracy(
        value=float(credit.nanmean()) if counted else float("nan"),
        counted=counted,
        pairs=len(margins),
        target_ties=int(target_tie.sum()),
        predicted_ties=int(predicted_tie.sum()),
        convention=convention.name,
    )


def accuracy_by_noise(scores: PairScores, *, ties: str | TieConvention = "half") -> dict[str, Accuracy]:
    """Pairwise accuracy of every setting: each noise level, and ``"ensemble"``."""
    return {
        setting: pairwise_accuracy(scores.margins[:, column], scores.p_chosen, ties=ties)
        for column, setting in enumerate(scores.protocol.settings)
    }


def _convention(ties: str | TieConvention) -> TieConvention:
    if isinstance(ties, TieConvention):
        return ties
    if ties not in TIE_CONVENTIONS:
        raise ValueError(f"unknown tie convention {ties!r}; choose one of {', '.join(TIE_CONVENTIONS)}")
    return TIE_CONVENTIONS[ties]
