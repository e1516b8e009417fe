"""How unsure a reward is of each score: the spread over noise draws, over noise levels, or over the members of its head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


SpreadName = Literal["draws", "levels", "heads"]
_EPS = 1e-12


@dataclass(frozen=True)
class ScoreParts:
    """All scores that one call has made.

    Args:
        draws (`Tensor`): of the ensemble, shape ``(draws, batch)``.
        levels (`Tensor`): of each level alone, shape ``(levels, draws, batch)``.
        members (`Tensor`): of each member of the head, shape ``(members, draws, batch)``.
    """

    draws: Tensor
    levels: Tensor
    members: Tensor


def score_spread(parts: ScoreParts, variance: Tensor, name: SpreadName | None = None) -> Tensor:
    """Standard deviation of every score, shape ``(batch,)``, differentiable.

    | name | over |
    |---|---|
    | ``draws`` | noise draws |
    | ``levels`` | noise levels, weighted with ``1 / (k sigma^2 + c)``, as the likelihood believes them |
    | ``heads`` | members of the head, each averaged over the draws |

    Args:
        parts: the scores.
        variance (`Tensor`): of the likelihood at each level, shape ``(levels,)``.
        name: which; by default that over heads, or else draws, or else levels, whichever there are several of.

    Raises:
        ValueError: there are not several of them; the message says what to do.
    """
    available: dict[SpreadName, int] = {
        "heads": len(parts.members),
        "draws": len(parts.draws),
        "levels": len(parts.levels),
    }
    if name is not None and name not in available:
        raise ValueError(f"unknown spread {name!r}; choose one of {', '.join(get_args(SpreadName))}")
    several: list[SpreadName] = [each for each, count in available.items() if count > 1]
    chosen = name or (several[0] if several else "draws")
    if available[chosen] < 2:
        raise ValueError(
            f"a spread over {chosen} needs several of them, and there is one: score with num_noise_samples of at least 2, "
            "with several noise levels, or with a reward whose head has several members (head num_members)"
        )
    if chosen == "draws":
        return _deviation(parts.draws, torch.ones(len(parts.draws), device=variance.device))
    if chosen == "heads":
        return _deviation(parts.members.mean(dim=1), torch.ones(len(parts.members), device=variance.device))
    return _deviation(parts.levels.mean(dim=1), 1 / variance)


def _deviation(scores: Tensor, weights: Tensor) -> Tensor:
    """Weighted standard deviation over the first dimension, unbiased for equal weights."""
    share = (weights / weights.sum()).to(scores)[:, None]
    mean = (share * scores).sum(dim=0)
    square = (share * (scores - mean).square()).sum(dim=0) * len(scores) / (len(scores) - 1)
    # At zero the root has no gradient.
    return (square + _EPS).sqrt()
