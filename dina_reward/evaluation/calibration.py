"""Calibration of preference probabilities: does a predicted 80 % come true in 80 % of the pairs?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


_CLIP = 1e-7


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose confidence lies in ``[low, high)`` (the last bin includes 1).

    Args:
        low, high: edges of the bin.
        count: pairs in it.
        confidence: mean predicted probability of the preferred side, NaN in an empty bin.
        frequency: share of these pairs in which that side really was preferred, NaN in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float
    frequency: float


@dataclass(frozen=True)
class Calibration:
    """Reliability of predicted preferences.

    Args:
        bins: table over confidence from 0.5 to 1.
        expected_calibration_error: ``sum_b (n_b / n) |confidence_b - frequency_b|`` (arXiv 1706.04599).
        nll: mean of ``-q log p - (1 - q) log(1 - p)``, in nats.
        brier: mean of ``(p - q)^2``.
    """

    bins: tuple[CalibrationBin, ...]
    expected_calibration_error: float
    nll: float
    brier: float


def measure_calibration(probabilities: Tensor, p_chosen: Tensor, *, num_bins: int = 10) -> Calibration:
    """Compares predicted probabilities with labels.

    Which side of a pair is called chosen carries no information here: a prediction ``p < 0.5`` is read as confidence
    ``1 - p`` in the other side.

    Args:
        probabilities (`Tensor`): predicted ``P(chosen > rejected)``, shape ``(pairs,)``.
        p_chosen (`Tensor`): labels in ``[0, 1]``, shape ``(pairs,)``.
        num_bins: bins of equal width over ``[0.5, 1]``.

    Raises:
        ValueError: shapes differ, no pairs, values outside ``[0, 1]``, or less than one bin.
    """
    p, q = probabilities.double(), p_chosen.double()
    if p.ndim != 1 or p.shape != q.shape or p.numel() == 0:
        raise ValueError(
            f"probabilities {tuple(p.shape)} and p_chosen {tuple(q.shape)} must both be (pairs,), with at least one pair"
        )
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    for name, values in (("probabilities", p), ("p_chosen", q)):
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"{name} must lie in [0, 1]")
    confidence, outcome = torch.where(p >= 0.5, p, 1 - p), torch.where(p >= 0.5, q, 1 - q)
    bins = _bins(confidence, outcome, num_bins)
    gaps = [bin_.count * abs(bin_.confidence - bin_.frequency) for bin_ in bins if bin_.count]
    return Calibration(
        bins=bins,
        expected_calibration_error=sum(gaps) / len(p),
        nll=float(pair_nll(p, q).mean()),
        brier=float((p - q).square().mean()),
    )


def pair_nll(probabilities: Tensor, p_chosen: Tensor) -> Tensor:
    """``-q log p - (1 - q) log(1 - p)`` of each pair, in nats, elementwise, with ``p`` kept from 0 and 1."""
    p = probabilities.double().clamp(_CLIP, 1 - _CLIP)
    return -(p_chosen * p.log() + (1 - p_chosen) * (1 - p).log())


def _bins(confidence: Tensor, outcome: Tensor, num_bins: int) -> tuple[CalibrationBin, ...]:
    index = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    width = 0.5 / num_bins
    result = []
    for number in range(num_bins):
        inside = index == number
        count = int(inside.sum())
        means = (float(x[inside].mean()) if count else float("nan") for x in (confidence, outcome))
        result.append(CalibrationBin(0.5 + number * width, 0.5 + (number + 1) * width, count, *means))
    return tuple(result)
