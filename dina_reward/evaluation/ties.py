"""Choosing how close two scores have to be for a predicted tie, on pairs that are not reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dina_reward.evaluation.accuracy import TieConvention, pair_credit


@dataclass(frozen=True)
class TieThreshold:
    """A threshold of predicted ties and where it is from.

    Args:
        value: margins of at most this size are predicted ties.
        origin: ``"exact ties"`` (zero), ``"given"`` or ``"tuned"``.
        validation_pairs: pairs it was tuned on; they are not part of the reported accuracy.
    """

    value: float = 0.0
    origin: str = "exact ties"
    validation_pairs: int = 0

    def describe(self) -> str:
        """For a table: how ties are predicted."""
        if self.origin == "tuned":
            return f"predicted tie: |margin| <= {self.value:.4g}, tuned on {self.validation_pairs} other pairs"
        if self.origin == "given":
            return f"predicted tie: |margin| <= {self.value:.4g}, as given"
        return "predicted tie: equal scores"


def tune_tie_threshold(margins: Tensor, p_chosen: Tensor, ties: str | TieConvention = "pickscore") -> float:
    """The threshold of the highest accuracy; the smallest of them where several are as good.

    Candidates are zero and the size of each margin. PickScore (arXiv 2305.01569) tunes a threshold on the difference of the
    two probabilities, which orders pairs as the size of the margin does.

    Args:
        margins (`Tensor`): ``a`` minus ``b`` score, shape ``(pairs,)``.
        p_chosen (`Tensor`): labels, shape ``(pairs,)``.
        ties: tie convention.

    Raises:
        ValueError: no pairs, or as for `pair_credit`.
    """
    if len(margins) == 0:
        raise ValueError("there are no pairs to tune the tie threshold on; give tie_threshold instead")
    as_tie = pair_credit(torch.zeros_like(margins), p_chosen, ties)
    as_order = pair_credit(margins, p_chosen, ties)
    keep = ~(as_tie.isnan() | as_order.isnan())
    size, order = margins.abs()[keep].sort()
    gain = (as_tie[keep] - as_order[keep])[order].cumsum(0)
    last = torch.ones_like(size, dtype=torch.bool)
    last[:-1] = size[1:] > size[:-1]
    thresholds = torch.cat([torch.zeros(1, dtype=size.dtype), size[last]])
    gains = torch.cat([torch.zeros(1, dtype=gain.dtype), gain[last]])
    best = (gains >= gains.max() - 1e-9).nonzero()[0] if len(gains) else 0
    return float(thresholds[best])


def validation_half(clusters: Sequence[object], seed: int) -> np.ndarray:
    """Marks the pairs of a random half of the clusters (prompts), shape ``(pairs,)``, bool.

    Raises:
        ValueError: less than two clusters, which cannot be divided.
    """
    names = list(dict.fromkeys(clusters))
    if len(names) < 2:
        raise ValueError("a tie threshold is tuned on half of the prompts, and there is only one; give tie_threshold")
    order = np.random.default_rng([seed, 1]).permutation(len(names))
    chosen = {names[number] for number in order[: len(names) // 2]}
    return np.array([cluster in chosen for cluster in clusters])
