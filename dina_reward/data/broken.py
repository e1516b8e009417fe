"""Rows that cannot be used: counted, reported with their index, and fatal only past a set share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


FIRST = 10


class BrokenRowError(ValueError):
    """A row of a preference dataset cannot be used.

    Args:
        index: row of the dataset, counted from 0.
        reason: what is wrong with it.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(index, reason)
        self.index, self.reason = index, reason

    def __str__(self) -> str:
        return f"row {self.index} of the dataset: {self.reason}"


@dataclass
class BrokenRows:
    """What a reader left out, and why.

    Args:
        rows: rows of the dataset.
        max_broken: share of them that may be broken.
        count: broken rows so far.
        first: index and reason of the first broken rows (ten at most).
        reasons: for each kind of defect the number of rows.
        dropped: pairs or rows left out on purpose, by what they are ("both bad", "confidence below 0.95", ...).
    """

    rows: int
    max_broken: float = 0.01
    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    _found_later: set[int] = field(default_factory=set, repr=False)

    def add(self, index: int, reason: str) -> None:
        """Counts a row that proved broken when it was read, e.g. an unreadable image; a row counts once.

        Raises:
            ValueError: more than ``max_broken`` of the rows are broken by now.
        """
        if index in self._found_later:
            return
        self._found_later.add(index)
        self.count += 1
        self.reasons[_kind(reason)] += 1
        if len(self.first) < FIRST:
            self.first.append((index, reason))
        self.check()

    def check(self) -> None:
        """Raises a `ValueError` with the first broken rows when there are more than ``max_broken`` allows."""
        if self.count <= self.max_broken * self.rows:
            return
        listed = "\n".join(f"  row {index}: {reason}" for index, reason in self.first)
        raise ValueError(
            f"{self.count} of {self.rows} rows are broken ({self.count / max(self.rows, 1):.2%}), more than "
            f"max_broken={self.max_broken:g} allows. The first ones:\n{listed}\n"
            "Repair the dataset, or raise max_broken to go on without them."
        )

    def __str__(self) -> str:
        lines = [f"{self.count} of {self.rows} rows are broken"]
        lines += [f"  row {index}: {reason}" for index, reason in self.first]
        if self.count > len(self.first):
            lines.append(f"  ... and {self.count - len(self.first)} more")
        lines += [f"left out on purpose: {count} ({what})" for what, count in self.dropped.items()]
        return "\n".join(lines)


class Defects:
    """Collects the broken rows of a dataset while its columns are checked, array by array.

    Args:
        rows: rows of the dataset.
    """

    def __init__(self, rows: int) -> None:
        self.broken = np.zeros(rows, bool)
        self._reasons: Counter[str] = Counter()
        self._details: dict[int, str] = {}

    def mark(self, where: np.ndarray, reason: str, values: object = None) -> None:
        """Marks rows as broken; a row keeps its first reason.

        Args:
            where: boolean, shape ``(rows,)``.
            reason: what is wrong with these rows.
            values: optional; indexable by row, shown beside the reason.
        """
        new = np.flatnonzero(where & ~self.broken)
        if len(new) == 0:
            return
        self.broken[new] = True
        self._reasons[reason] += len(new)
        for index in new[:FIRST].tolist():
            self._details[index] = reason if values is None else f"{reason}: {_shown(values[index])}"  # type: ignore[index]

    def mark_rows(self, reasons: Mapping[int, str]) -> None:
        """Marks single rows, each with its own reason; before any other marks."""
        self.broken[list(reasons)] = True
        self._reasons.update(map(_kind, reasons.values()))
        self._details.update(sorted(reasons.items())[:FIRST])

    def report(self, max_broken: float) -> BrokenRows:
        """The report so far; raises nothing."""
        first = sorted(self._details.items())[:FIRST]
        return BrokenRows(len(self.broken), max_broken, int(self.broken.sum()), first, Counter(self._reasons))


def _kind(reason: str) -> str:
    """A reason without its details."""
    return reason.split(":")[0].split(" (")[0]


def _shown(value: object) -> str:
    """A value, shortened to fit a line."""
    value = value.as_py() if hasattr(value, "as_py") else value
    text = repr(value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value)
    return text if len(text) <= 80 else text[:77] + "..."
