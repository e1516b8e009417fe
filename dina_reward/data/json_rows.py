"""JSON records as Arrow tables, in batches and past damaged lines, where `datasets` loads whole lists and gives up.

Memory holds columns and not objects: 1,000,000 records of HPDv3, one long list, took `datasets` 3.9 GB.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from tqdm.auto import tqdm

from dina_reward.checks.values import is_text
from dina_reward.data.files import text_encoding


BATCH_ROWS = 20_000
BLOCK = 1 << 22
LONGEST_RECORD = 1 << 26
SPACE = re.compile(r"[ \t\r\n]*")


class DamagedRecord:
    """Stands for a record that could not be read.

    Args:
        reason: what is wrong with it.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


def read_json_rows(path: Path) -> tuple[pa.Table, dict[int, str]]:
    """Reads a list of objects, or one object per line.

    A column whose values have several types is stored as JSON text (type ``pyarrow.json_()``).

    Args:
        path: the file: UTF-8, or UTF-16 or 32 with a BOM.

    Returns:
        The table, and for each record that is no object or no text (or a line that is no JSON) its index and the reason.
        Such records are rows of nulls.

    Raises:
        ValueError: the file is no JSON, or neither a list nor lines of objects.
    """
    damaged: dict[int, str] = {}
    tables: list[pa.Table] = []
    rows = 0
    with (
        # Bytes of another encoding become halves of characters, by which their records are known as damaged.
        path.open(encoding=text_encoding(path), errors="surrogateescape") as file,
        tqdm(
            total=path.stat().st_size,
            desc=f"reading {path.name}",
            unit="B",
            unit_scale=True,
            disable=None,
            leave=False,
        ) as progress,
    ):
        records = _records(file, path, progress)
        while batch := list(islice(records, BATCH_ROWS)):
            for index, record in enumerate(batch):
                if not isinstance(record, dict):
                    reason = getattr(record, "reason", f"the record is no object but {type(record).__name__}")
                    damaged[rows + index] = reason
                    batch[index] = {}
            try:
                table = _table(batch)
            except UnicodeEncodeError:
                for index, record in enumerate(batch):
                    if not is_text(json.dumps(record, ensure_ascii=False)):
                        damaged[rows + index] = "its text holds half of a character, or is not UTF-8"
                        batch[index] = {}
                table = _table(batch)
            tables.append(table)
            rows += len(batch)
    if not any(name for table in tables for name in table.column_names):
        raise ValueError(f"{path} holds no records")
    return _concatenate(tables), damaged


def _records(file: IO[str], path: Path, progress: Any) -> Iterator[Any]:
    """The records of either form."""
    buffer = ""
    while not buffer.strip():
        block = file.read(BLOCK)
        if not block:
            return iter(())
        buffer += block
    start = buffer.lstrip()
    return _list_items(file, start[1:], path, progress) if start[0] == "[" else _lines(file, start, path, progress)


def _list_items(file: IO[str], buffer: str, path: Path, progress: Any) -> Iterator[Any]:
    """The items of one long list; ``buffer`` begins behind its bracket."""
    decode = json.JSONDecoder().raw_decode
    position, expects_item = 0, True
    while True:
        position = SPACE.match(buffer, position).end()  # type: ignore[union-attr]
        mark = buffer[position : position + 1]
        if mark == "]":
            return
        if mark == "," and not expects_item:
            position, expects_item = position + 1, True
            continue
        problem = "the list does not end" if not mark else f"unexpected {mark!r} between items"
        if mark and expects_item:
            try:
                item, position = decode(buffer, position)
            except json.JSONDecodeError as error:
                problem = str(error)
            except (RecursionError, ValueError) as error:
                raise ValueError(f"{path} is no valid JSON: an item is nested too deeply, or {error}") from error
            else:
                expects_item = False
                yield item
                continue
        block = file.read(BLOCK)
        if not block or len(buffer) - position > LONGEST_RECORD:
            raise ValueError(f"{path} is no valid JSON: {problem}")
        progress.update(position)
        buffer, position = buffer[position:] + block, 0


def _lines(file: IO[str], buffer: str, path: Path, progress: Any) -> Iterator[Any]:
    """One record per line; a line that is no JSON is a damaged record, unless it is the first."""
    first = True
    while buffer:
        buffer += file.readline()
        for line in buffer.split("\n"):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                if first:
                    raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}") from None
                yield DamagedRecord(f"the line is no JSON: {error}")
            first = False
        progress.update(len(buffer))
        buffer = file.read(BLOCK)


def _table(batch: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(chain.from_iterable(batch))
    return pa.table(
        {name: _column([record.get(name) for record in batch]) for name in names} or {"": pa.nulls(len(batch))}
    )


def _column(values: list[Any]) -> pa.Array:
    """Values as the type they share; failing that, with the word "null" read as null; failing that, as JSON text."""
    for nulls_are_words in (True, False):
        try:
            return pa.array(values if nulls_are_words else [None if value == "null" else value for value in values])
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue
    return _as_json(values)


def _as_json(values: list[Any]) -> pa.Array:
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.array(texts, pa.string()).cast(pa.json_())


def _concatenate(tables: list[pa.Table]) -> pa.Table:
    """One table; columns whose batches differ in kind become JSON text."""
    names = dict.fromkeys(name for table in tables for name in table.column_names if name)
    columns = {}
    for name in names:
        parts = [
            table.column(name) if name in table.column_names else pa.chunked_array([pa.nulls(len(table))])
            for table in tables
        ]
        columns[name] = _join(parts)
    return pa.table(columns)


def _join(parts: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    try:
        joined = pa.concat_tables([pa.table({"x": part}) for part in parts], promote_options="permissive")
        return joined.column("x")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        pass
    chunks = []
    for part in parts:
        is_json = part.type == pa.json_()
        chunks += [chunk if is_json else _as_json(chunk.to_pylist()) for chunk in part.chunks]
    return pa.chunked_array(chunks, pa.json_())
