"""Pairs whose scores are written down in the test."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dina_reward.data import Preference


def pairs_with_scores(
    rows: Sequence[tuple[float, float, float]],
    prompts: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
) -> list[Preference]:
    """Pairs of constant latents from rows of (score of a, score of b, p_a); `first_value` reads the scores back."""
    return [
        Preference(
            prompt=prompts[number] if prompts else f"prompt {number}",
            a=torch.full((2, 4, 4), float(a)),
            b=torch.full((2, 4, 4), float(b)),
            p_a=p_a,
            source=sources[number] if sources else "",
        )
        for number, (a, b, p_a) in enumerate(rows)
    ]


def ranking_pairs(
    group: str, scores: Sequence[float], ranks: Sequence[int], *, leave_out: tuple[int, int] | None = None
) -> list[Preference]:
    """All pairs of one ranking; the lower rank is preferred."""
    return [
        Preference(
            prompt=group,
            a=torch.full((2, 4, 4), float(scores[i])),
            b=torch.full((2, 4, 4), float(scores[j])),
            p_a=0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j]),
            group=group,
            a_name=f"{group}/{i}",
            b_name=f"{group}/{j}",
        )
        for i in range(len(scores))
        for j in range(i + 1, len(scores))
        if (i, j) != leave_out
    ]


def first_value(latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """The score that a constant latent stands for."""
    return latents[:, 0, 0, 0]
