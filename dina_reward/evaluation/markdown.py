"""Markdown tables, numbers in them, and plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, numbers to the right."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(columns))]
    left = [any(row[index][:1].isalpha() for row in cells[1:]) or index == 0 for index in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        texts = (t.ljust(w) if side else t.rjust(w) for t, w, side in zip(row, widths, left, strict=True))
        return "| " + " | ".join(texts) + " |"

    rule = (
        "|"
        + "|".join("-" * (w + 2) if side else "-" * (w + 1) + ":" for w, side in zip(widths, left, strict=True))
        + "|"
    )
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """``82.13 [81.20, 83.01]``: a share and its interval in per cent."""
    text = f"{100 * value:.2f}"
    if interval is None or any(math.isnan(bound) for bound in interval):
        return text
    low, high = interval
    return f"{text} [{100 * low:.2f}, {100 * high:.2f}]"


def decimal(value: float) -> str:
    """Three decimals, a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def plain(value: Any) -> Any:
    """A dictionary as JSON has it: lists for tuples, ``None`` for NaN."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
