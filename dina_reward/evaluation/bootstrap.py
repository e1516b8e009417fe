"""Confidence intervals by resampling whole clusters (prompts), in draws that all rewards share and without SciPy.

`scipy.stats.bootstrap` would draw for each quantity anew, and is not needed otherwise. A quantity is a ratio of sums over
pairs, such as credit over pairs that count. With ``w_c`` the number of times that cluster ``c`` was drawn, a resampled value
is ``sum_c w_c S_c / sum_c w_c N_c``; the interval is between percentiles of many of them (Efron & Tibshirani 1993, chapter
13). Differences between rewards are paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


_CELLS_AT_ONCE = 10_000_000


class ClusterBootstrap:
    """Resamples of clusters, drawn once from a seed.

    Examples:
        >>> bootstrap = ClusterBootstrap(prompts, resamples=1000, seed=0)
        >>> low, high = bootstrap.interval(bootstrap.means(credit))[0]

    Args:
        clusters: cluster of each pair.
        resamples: how often the clusters are drawn again.
        seed: seed of the draws.

    Raises:
        ValueError: no pairs, or less than one resample.
    """

    def __init__(self, clusters: Sequence[object], *, resamples: int = 1000, seed: int = 0) -> None:
        if len(clusters) == 0 or resamples < 1:
            raise ValueError(f"got {len(clusters)} pairs and {resamples} resamples; expected at least one of each")
        names = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
        self.rows = np.array([names[cluster] for cluster in clusters])
        self.num_clusters, self.resamples, self.seed = len(names), resamples, seed

    def means(self, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Weighted mean of each column in each resample, shape ``(resamples, columns)``.

        Args:
            values: shape ``(pairs,)`` or ``(pairs, columns)``; NaN where a pair does not count.
            weights: of each pair, same shape as ``values`` or ``(pairs, 1)``; one by default.
        """
        values = values[:, None] if values.ndim == 1 else values
        weights = np.ones((1, 1)) if weights is None else weights[:, None] if weights.ndim == 1 else weights
        counted = np.where(np.isnan(values), 0.0, np.broadcast_to(weights, values.shape))
        sums = np.zeros((self.num_clusters, 2 * values.shape[1]))
        np.add.at(sums, self.rows, np.hstack([np.nan_to_num(values) * counted, counted]))
        drawn = np.concatenate([times @ sums for times in self._draws()])
        total, count = np.hsplit(drawn, 2)
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)

    def interval(self, means: np.ndarray, confidence: float = 0.95) -> np.ndarray:
        """Percentile interval of each column of `means`, shape ``(columns, 2)``; NaN with a single cluster.

        Args:
            means: shape ``(resamples, columns)``.
            confidence: probability mass between the two bounds.
        """
        bounds = np.full((means.shape[1], 2), np.nan)
        tail = (1 - confidence) / 2
        usable = ~np.isnan(means).all(axis=0)
        if self.num_clusters > 1 and usable.any():
            bounds[usable] = np.nanquantile(means[:, usable], [tail, 1 - tail], axis=0).T
        return bounds

    def _draws(self) -> Iterator[np.ndarray]:
        """How often each cluster is drawn, in blocks of shape ``(some resamples, clusters)``; the same at every call."""
        generator = np.random.default_rng(self.seed)
        size = max(1, _CELLS_AT_ONCE // self.num_clusters)
        for start in range(0, self.resamples, size):
            count = min(size, self.resamples - start)
            picks = generator.integers(0, self.num_clusters, size=(count, self.num_clusters))
            picks += self.num_clusters * np.arange(count)[:, None]
            times = np.bincount(picks.ravel(), minlength=count * self.num_clusters)
            yield times.reshape(count, self.num_clusters).astype(np.float64)
