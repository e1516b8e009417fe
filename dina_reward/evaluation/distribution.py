"""How scores are distributed, for choosing the affine map of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
HISTOGRAM_BINS = 40


@dataclass(frozen=True)
class ScoreDistribution:
    """Raw scores of all samples of a dataset in one setting.

    Args:
        count: samples.
        mean, std: of the scores; the standard deviation is NaN for one sample.
        minimum, maximum: range.
        quantiles: by probability, ``"0.5"`` is the median.
        suggested_shift, suggested_scale: ``score_shift`` and ``score_scale`` with which ``(raw + shift) / scale`` has mean 0
            and standard deviation 1 on this dataset; NaN where all scores are equal.
        histogram: samples in bins of equal width between ``minimum`` and ``maximum``.
    """

    count: int
    mean: float
    std: float
    minimum: float
    maximum: float
    quantiles: dict[str, float]
    suggested_shift: float
    suggested_scale: float
    histogram: tuple[int, ...]


def describe_scores(scores: Tensor) -> ScoreDistribution:
    """Distribution of scores of shape ``(samples,)``.

    Raises:
        ValueError: no scores, or another shape.
    """
    if scores.ndim != 1 or scores.numel() == 0:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; expected (samples,) with at least one")
    values = scores.double()
    mean, std = float(values.mean()), float(values.std()) if len(values) > 1 else float("nan")
    # torch.quantile refuses more than 16 million values; a sorted look-up does not.
    ordered = values.sort().values
    positions = torch.tensor(QUANTILES, dtype=torch.float64) * (len(values) - 1)
    low, part = positions.long(), positions.frac()
    cut = torch.lerp(ordered[low], ordered[(low + 1).clamp(max=len(values) - 1)], part)
    return ScoreDistribution(
        count=len(values),
        mean=mean,
        std=std,
        minimum=float(ordered[0]),
        maximum=float(ordered[-1]),
        quantiles={f"{q:g}": float(value) for q, value in zip(QUANTILES, cut, strict=True)},
        suggested_shift=-mean if std > 0 else float("nan"),
        suggested_scale=std if std > 0 else float("nan"),
        histogram=tuple(int(n) for n in np.histogram(values.numpy(), bins=HISTOGRAM_BINS)[0]),
    )
