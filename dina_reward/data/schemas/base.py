"""What a schema is: the columns it needs, and how they become an index of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dina_reward.data.columns import Columns
from dina_reward.data.pairs import PairIndex, SideIndex


@dataclass(frozen=True)
class Options:
    """Choices that a schema may need.

    Args:
        soft_labels: vote counts become the share of votes; otherwise the majority is certain.
        dimension: which of several judgements to read.
    """

    soft_labels: bool = True
    dimension: str = "Overall"


@dataclass(frozen=True)
class Schema:
    """A published layout of preference data.

    Args:
        name: how it is asked for.
        alternatives: sets of columns, one of which must be there.
        index: builds the pairs and marks broken rows in the columns' defects.
        dimensions: judgements to choose from, where there are several.
    """

    name: str
    alternatives: tuple[tuple[str, ...], ...]
    index: Callable[[Columns, Options], PairIndex]
    dimensions: tuple[str, ...] = ()

    def missing(self, columns: set[str]) -> list[str]:
        """Columns that the nearest alternative lacks."""
        return min(([name for name in names if name not in columns] for names in self.alternatives), key=len)


def side_of_rows(
    columns: Columns, column: str, position: int | None = None, name_column: str | None = None
) -> SideIndex:
    """One side per row of the dataset, in a column of its own or at one place of the row's list."""
    rows = np.arange(columns.rows)
    positions = None if position is None else np.full(columns.rows, position, np.int64)
    named = name_column if name_column is not None and columns.has(name_column) else None
    return SideIndex(column, rows, positions, named)


def model_columns(columns: Columns, first: str, second: str) -> tuple[str, str] | None:
    return (first, second) if columns.has(first, second) else None


def share_of_votes(first: np.ndarray, second: np.ndarray, soft: bool) -> np.ndarray:
    """Probability that the first is preferred: the share of its votes, or 1, 0 and 0.5 by majority; NaN without votes."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = first / (first + second)
    if soft:
        return share
    return np.where(np.isnan(share), np.nan, np.where(share > 0.5, 1.0, np.where(share < 0.5, 0.0, 0.5)))
