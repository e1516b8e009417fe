"""Columns of a dataset that its pairs can be grouped by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def select_columns(by: str | Sequence[str], columns: Mapping[str, Sequence[object]]) -> dict[str, Sequence[object]]:
    """The columns named in ``by``.

    Raises:
        ValueError: there is no such column; the message names those there are.
    """
    names = [by] if isinstance(by, str) else list(dict.fromkeys(by))
    missing = [name for name in names if name not in columns]
    if missing:
        there = ", ".join(sorted(columns)) or "none that could be grouped by"
        raise ValueError(f"the dataset has no column {', '.join(map(repr, missing))}; it has {there}")
    return {name: columns[name] for name in names}


def plain_columns(record: Mapping[str, Any]) -> dict[str, object]:
    """The columns of a row that cells can be made of: text, numbers, truth values and short lists of them."""
    result: dict[str, object] = {}
    for name, value in record.items():
        if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
            value = value.item()
        if isinstance(value, tuple | list) and all(isinstance(part, str | int) for part in value):
            value = text_of(value)
        if value is None or isinstance(value, str | int | float):
            result[name] = value
    return result


def text_of(value: Any) -> str:
    """A value as text: empty for none, the parts of a list joined by ``x`` (a size)."""
    if value is None:
        return ""
    if isinstance(value, np.ndarray | Tensor) and value.ndim:
        value = tuple(int(number) for number in value)
    return "x".join(str(part) for part in value) if isinstance(value, tuple | list) else str(value)
