"""How much of the variance of score margins is noise: what an average over draws can take away at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MarginVariance:
    """Variance of the margins at one level, split in two.

    Args:
        noise_level: the level.
        between: variance between pairs, of the margins' means over noise draws.
        noise: variance over the draws of one pair, mean over pairs.
        noise_share: ``noise / (between + noise)``, in ``[0, 1]``; NaN where all margins are zero.
    """

    noise_level: float
    between: float
    noise: float
    noise_share: float


def margin_variances(margins: Tensor, noise_levels: Sequence[float]) -> tuple[MarginVariance, ...]:
    """Splits the variance of margins, level by level.

    Which side of a pair is called the first carries no information, so every pair counts in both orders, and the mean
    margin is zero: the whole is ``mean(m^2)``, the noise is the unbiased variance over the draws of a pair, the rest is
    between pairs.

    Args:
        margins (`Tensor`): shape ``(pairs, levels, draws)``, with independent draws.
        noise_levels: the levels.

    Raises:
        ValueError: less than two draws, or shapes differ.
    """
    if margins.ndim != 3 or margins.shape[1] != len(noise_levels) or margins.shape[2] < 2:
        raise ValueError(
            f"margins have shape {tuple(margins.shape)}; expected (pairs, {len(noise_levels)}, draws), two draws or more"
        )
    values = margins.double()
    noise, total = values.var(dim=2).mean(dim=0).tolist(), values.square().mean(dim=(0, 2)).tolist()
    return tuple(
        MarginVariance(level, max(whole - part, 0.0), part, min(part / whole, 1.0) if whole else float("nan"))
        for level, part, whole in zip(noise_levels, noise, total, strict=True)
    )
