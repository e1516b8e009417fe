"""Columns of a dataset as arrays of one type, whatever the file made of them; values that do not fit are defects.

Files of one schema differ in types: a number may be text, the text "null" may stand for no value, a list may be JSON.
Everything here works on whole Arrow columns; only columns of mixed types are walked through value by value.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dina_reward.data.broken import Defects


if TYPE_CHECKING:
    import datasets

NO_VALUE = ("null", "none", "nan", "")
"""Words that stand for no value, in lower case."""
SCAN_ROWS = 512
_BINARY = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)


class Columns:
    """Typed access to the columns of a dataset; values that cannot be read are marked in ``defects``.

    Args:
        dataset: the rows.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset
        self.defects = Defects(len(dataset))

    @property
    def rows(self) -> int:
        return len(self.dataset)

    def has(self, *names: str) -> bool:
        return all(name in self.dataset.column_names for name in names)

    def raw(self, name: str) -> pa.ChunkedArray:
        """A column as Arrow holds it, JSON values as text; not for columns of images."""
        column = self.dataset.select_columns([name]).with_format("arrow")[:].column(0)
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, column.type.value_type)
        plain = without_views(column.type)
        if plain == column.type:
            return column
        chunks = [pa.array(chunk.to_pylist(), plain) for chunk in column.chunks]
        return pa.chunked_array(chunks, plain)

    def text(self, name: str, *, optional: bool = False) -> pa.ChunkedArray:
        """Strings. ``optional``: null and the text "null" are no value; otherwise null is a defect and text is text."""
        column = self.raw(name)
        if optional and _is_number(column.type):
            column = pc.cast(column, pa.string())
        if _is_text(column.type):
            return _without_nulls(column) if optional else self._required(column, name)
        column = self._walk(column, name, pa.large_string(), _as_text)
        return _without_nulls(column) if optional else self._required(column, name)

    def number(self, name: str, *, optional: bool = False, nan_is_missing: bool = True) -> np.ndarray:
        """float64, shape ``(rows,)``; no value is NaN, and a defect unless ``optional``.

        Args:
            nan_is_missing: whether a stored NaN is no value, as pandas writes it, or else a defect.
        """
        column = self.raw(name)
        if _is_text(column.type):
            try:
                column = pc.cast(_without_nulls(column), pa.float64())
            except pa.ArrowInvalid:
                column = self._walk(column, name, pa.float64(), _as_number)
        elif not (_is_number(column.type) or pa.types.is_null(column.type)):
            column = self._walk(column, name, pa.float64(), _as_number)
        values = np.asarray(pc.cast(column, pa.float64(), safe=False).to_numpy(), dtype=np.float64)
        if not nan_is_missing:
            self.defects.mark(np.isnan(values) & as_mask(pc.is_valid(column)), f"{name} is NaN")
        infinite = np.isinf(values)
        self.defects.mark(infinite, f"{name} is infinite")
        if not optional:
            self.defects.mark(np.isnan(values), f"{name} is missing")
        return np.where(infinite, np.nan, values)

    def lists(self, name: str, *, of_numbers: bool, optional: bool = False) -> pa.Array:
        """Lists of float64 or of text, one array; a list with an empty place inside is a defect and becomes null."""
        column = self.raw(name)
        wanted = pa.large_list(pa.float64() if of_numbers else pa.large_string())
        element = (
            column.type.value_type if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) else None
        )
        if element is not None and (_is_number if of_numbers else _is_text)(element):
            column = pc.cast(column, wanted, safe=False)
        elif not pa.types.is_null(element or column.type):
            column = self._walk(column, name, wanted, _as_numbers if of_numbers else _as_texts)
        lists = pa.concat_arrays([chunk.cast(wanted) for chunk in column.chunks] or [pa.array([], wanted)])
        gaps = np.zeros(self.rows, bool)
        gaps[
            pc.list_parent_indices(lists).to_numpy()[as_mask(pc.is_null(pc.list_flatten(lists), nan_is_null=True))]
        ] = True
        self.defects.mark(gaps, f"{name} has an empty place", column)
        if gaps.any():
            lists = pc.if_else(pa.array(gaps), pa.scalar(None, wanted), lists)
        return lists if optional else self._required(lists, name)

    def two_numbers(self, name: str) -> np.ndarray:
        """Lists of two numbers, float64, shape ``(rows, 2)``; other lengths are a defect, no value is NaN."""
        lists = self.lists(name, of_numbers=True, optional=True)
        length = pc.list_value_length(lists)
        wrong = as_mask(pc.not_equal(length, 2))
        self.defects.mark(wrong, f"{name} does not hold two numbers", lists)
        fits = as_mask(pc.equal(length, 2))
        values = np.full((self.rows, 2), np.nan)
        values[fits] = pc.list_flatten(lists.filter(pa.array(fits))).to_numpy(zero_copy_only=False).reshape(-1, 2)
        return values

    def present(self, name: str) -> None:
        """Marks rows without an image in a column as defects; image bytes are not read."""
        column_type = self.dataset.features.arrow_schema.field(name).type
        if not _holds_data(column_type):
            column = self.text(name)
            self.defects.mark(as_mask(pc.equal(pc.utf8_length(column), 0)), f"{name} is missing")
            return
        parts = []
        for batch in self.dataset.select_columns([name]).with_format("arrow").iter(SCAN_ROWS):
            column = batch.column(0)
            valid = pc.is_valid(column)
            if pa.types.is_struct(column.type):
                fields = [pc.is_valid(pc.struct_field(column, i)) for i in range(column.type.num_fields)]
                valid = pc.and_(valid, fields[0] if len(fields) == 1 else pc.or_(*fields[:2]))
            parts.append(as_mask(valid))
        self.defects.mark(~np.concatenate(parts), f"{name} is missing")

    def _required(self, column: Any, name: str) -> Any:
        self.defects.mark(as_mask(pc.is_null(column)), f"{name} is missing")
        return column

    def _walk(
        self, column: pa.ChunkedArray, name: str, wanted: pa.DataType, convert: Callable[[Any], Any]
    ) -> pa.ChunkedArray:
        """Converts value by value; those that do not fit become null and are marked."""
        is_json = isinstance(column.type, pa.BaseExtensionType) and column.type.extension_name == "arrow.json"
        values: list[pa.Array] = []
        wrong: dict[int, Any] = {}
        start = 0
        for chunk in column.chunks:
            converted = []
            for index, value in enumerate(chunk.to_pylist(), start):
                value = json.loads(value) if is_json and value is not None else value
                try:
                    converted.append(None if value is None else convert(value))
                except (TypeError, ValueError):
                    converted.append(None)
                    wrong[index] = value
            values.append(pa.array(converted, wanted))
            start += len(chunk)
        where = np.zeros(self.rows, bool)
        where[list(wrong)] = True
        self.defects.mark(where, f"{name} has the wrong type", wrong)
        return pa.chunked_array(values, wanted)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def without_views(kind: pa.DataType) -> pa.DataType:
    """A type with plain text for views of text (and lists of them), for which Arrow has few functions."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner = without_views(kind.value_type)
        return kind if inner == kind.value_type else pa.large_list(inner)
    return kind


def _holds_data(kind: pa.DataType) -> bool:
    """Whether a column stores images or latents themselves, not paths."""
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name != "arrow.json"
    return pa.types.is_nested(kind) or any(is_kind(kind) for is_kind in _BINARY)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def as_mask(column: Any) -> np.ndarray:
    """Boolean array of an Arrow column; null is False."""
    return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), dtype=bool)


def _without_nulls(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Replaces the words that stand for no value by null."""
    stands_for_nothing = pc.is_in(pc.utf8_lower(pc.utf8_trim_whitespace(column)), pa.array(NO_VALUE, column.type))
    return pc.if_else(stands_for_nothing, pa.scalar(None, column.type), column)


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _as_number(value: Any) -> float | None:
    if isinstance(value, str) and value.strip().lower() in NO_VALUE:
        return None
    return float(value)


def _as_numbers(value: Any) -> list[float | None] | None:
    return _as_list(value, float)


def _as_texts(value: Any) -> list[str | None] | None:
    return _as_list(value, _as_text)


def _as_list(value: Any, convert: Callable[[Any], Any]) -> list[Any] | None:
    if isinstance(value, str):
        value = None if value.strip().lower() in NO_VALUE else json.loads(value)
    if value is None:
        return None
    if not isinstance(value, list):
        raise TypeError(value)
    return [None if item is None else convert(item) for item in value]
