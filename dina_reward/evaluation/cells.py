"""Parts of a dataset: accuracy, margin and calibration of the pairs that share a value of a column, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dina_reward.evaluation.accuracy import Accuracy, TieConvention, pair_credit, pairwise_accuracy, ranking_weights
from dina_reward.evaluation.bootstrap import ClusterBootstrap
from dina_reward.evaluation.calibration import measure_calibration


FEW_PAIRS = 100
"""Cells in which fewer pairs count are marked: at 100 pairs a coin flip's 95 % interval still reaches from 40 to 60 %."""
MAX_CELLS = 40
REST = "all others"
"""Name of the cells that are too many to be listed one by one."""
NO_VALUE = "(no value)"
"""Name of the cell of the pairs that a column says nothing about."""
_MAX_NUMBERS = 12


@dataclass(frozen=True)
class Cell:
    """The pairs that share one value of a column, in one setting.

    Args:
        accuracy: with its bootstrap interval.
        mean_margin: mean score difference in favour of the side that the label prefers, over pairs whose label is no tie;
            NaN without such pairs.
        calibration_error: expected calibration error; ``None`` where there are no probabilities.
        few: fewer than `FEW_PAIRS` pairs count.
    """

    accuracy: Accuracy
    mean_margin: float
    calibration_error: float | None
    few: bool


Cells = dict[str, dict[str, Cell]]
"""By column and value, the value of the most pairs first."""


def worst_cell(cells: Mapping[str, Cell]) -> tuple[str, Cell] | None:
    """Name and figures of the cell of the lowest accuracy; ``None`` for less than two cells, or where all have few pairs."""
    enough = {name: cell for name, cell in cells.items() if not cell.few}
    if len(cells) < 2 or not enough:
        return None
    return min(enough.items(), key=lambda item: item[1].accuracy.value)


class CellAnalysis:
    """What all settings of all rewards share: which pairs are in which cell, and the resamples of the prompts.

    Args:
        columns: by name, one value per pair. Text, numbers and truth values; numbers with more than twelve different values
            are cut into four classes of equally many pairs. Values beyond the `MAX_CELLS` most frequent become one cell.
        clusters: what is resampled together, one per pair: the prompt.
        ties: tie convention.
        rankings: ranking of each pair, for a convention that averages over rankings.
        resamples, seed: of the bootstrap.
        num_bins: of the calibration error.

    Raises:
        ValueError: no pairs, or a column of another length.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[object]],
        clusters: Sequence[object],
        *,
        ties: str | TieConvention = "half",
        rankings: Sequence[object] | None = None,
        resamples: int = 1000,
        seed: int = 0,
        num_bins: int = 10,
    ) -> None:
        wrong = {name: len(values) for name, values in columns.items() if len(values) != len(clusters)}
        if wrong:
            raise ValueError(f"columns need one value for each of the {len(clusters)} pairs, got lengths {wrong}")
        self.ties, self.rankings, self.num_bins = TieConvention.named(ties), rankings, num_bins
        self.bootstrap = ClusterBootstrap(clusters, resamples=resamples, seed=seed)
        self.rows = {name: _rows_by_value(values) for name, values in columns.items()}

    def measure(
        self, margins: Tensor, labels: Tensor, *, threshold: float = 0.0, probabilities: Tensor | None = None
    ) -> tuple[Accuracy, Cells, np.ndarray]:
        """One setting of one reward.

        Args:
            margins: first minus second score, shape ``(pairs,)``.
            labels: probability that the first side is preferred, shape ``(pairs,)``.
            threshold: margins of at most this size are predicted ties.
            probabilities: what the reward predicts, shape ``(pairs,)``, where it has a likelihood.

        Returns:
            Accuracy of all pairs, the cells, and the total in each resample, shape ``(resamples,)``.
        """
        parts = [np.ones(len(margins), dtype=bool)]
        parts += [rows for cells in self.rows.values() for rows in cells.values()]
        credit = pair_credit(margins, labels, self.ties, threshold).numpy()
        weights = None
        if self.rankings is not None:
            weights = np.stack([self._weights(rows & ~np.isnan(credit)) for rows in parts], axis=1)
        drawn = self.bootstrap.means(np.stack([np.where(rows, credit, np.nan) for rows in parts], axis=1), weights)
        accuracies = [
            replace(self._accuracy(margins, labels, threshold, rows), interval=(float(low), float(high)))
            for rows, (low, high) in zip(parts, self.bootstrap.interval(drawn), strict=True)
        ]
        rest = iter(accuracies[1:])
        cells = {
            column: {
                name: self._cell(next(rest), margins, labels, probabilities, rows) for name, rows in group.items()
            }
            for column, group in self.rows.items()
        }
        return accuracies[0], cells, drawn[:, 0]

    def _cell(
        self, accuracy: Accuracy, margins: Tensor, labels: Tensor, probabilities: Tensor | None, rows: np.ndarray
    ) -> Cell:
        inside = torch.from_numpy(rows)
        sides = (labels[inside] - 0.5).sign()
        towards = (margins[inside].double() * sides)[sides != 0]
        error = None
        if probabilities is not None:
            fit = measure_calibration(probabilities[inside], labels[inside], num_bins=self.num_bins)
            error = fit.expected_calibration_error
        mean_margin = float(towards.mean()) if len(towards) else float("nan")
        return Cell(accuracy, mean_margin, error, accuracy.counted < FEW_PAIRS)

    def _accuracy(self, margins: Tensor, labels: Tensor, threshold: float, rows: np.ndarray) -> Accuracy:
        inside = torch.from_numpy(rows)
        rankings = None
        if self.rankings is not None:
            rankings = [self.rankings[row] for row in np.flatnonzero(rows).tolist()]
        return pairwise_accuracy(
            margins[inside], labels[inside], ties=self.ties, tie_threshold=threshold, rankings=rankings
        )

    def _weights(self, rows: np.ndarray) -> np.ndarray:
        """Weight of each pair within the rankings of a part, zero outside it."""
        assert self.rankings is not None
        weights = np.zeros(len(rows))
        weights[rows] = ranking_weights([self.rankings[row] for row in np.flatnonzero(rows).tolist()]).numpy()
        return weights


def _rows_by_value(values: Sequence[object]) -> dict[str, np.ndarray]:
    """Rows of each value, the most frequent first; those beyond `MAX_CELLS` become one. Nothing where none has a value."""
    names = _names(values)
    counts = Counter(name for name in names if name)
    if not counts:
        return {}
    listed = [name for name, _ in counts.most_common(MAX_CELLS)]
    shown = np.array([NO_VALUE if not name else name if name in listed else REST for name in names], dtype=object)
    return {name: shown == name for name in (*listed, REST, NO_VALUE) if name in set(shown)}


def _names(values: Sequence[object]) -> list[str]:
    """Name of each pair's cell, empty without a value."""
    values = [None if isinstance(value, float) and np.isnan(value) else value for value in values]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    there = [value for value in values if value is not None and value != ""]
    if len(numbers) < len(there) or len(set(numbers)) <= _MAX_NUMBERS:
        return ["" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    edges = np.quantile(np.array(numbers, dtype=np.float64), [0, 0.25, 0.5, 0.75, 1])
    classes = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
    places = np.searchsorted(edges[1:-1], np.array([np.nan if v is None or v == "" else v for v in values], float))
    return ["" if v is None or v == "" else classes[place] for v, place in zip(values, places, strict=True)]
