"""Published preference datasets as one kind of record.

    >>> pairs = read_preferences("HPDv3/train.json", min_confidence=0.95, max_pairs_per_prompt=8)
    >>> len(pairs), pairs[0].prompt, pairs[0].a.size, pairs[0].p_a
    >>> print(pairs.report)  # what was left out, and why

Labels, weights and filters are worked out for all pairs at once when a dataset is opened; images are read when a pair is.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from torch.utils.data import Dataset

from dina_reward.checks.values import checked_int, is_real
from dina_reward.data.broken import BrokenRowError, BrokenRows
from dina_reward.data.columns import NO_VALUE, Columns
from dina_reward.data.pairs import PairIndex, SideIndex, swapped_sides, within_limit
from dina_reward.data.preference import Preference
from dina_reward.data.rankings import Ranking, RankingList
from dina_reward.data.schemas import Options, Schema, find_schema
from dina_reward.data.sides import Side, published_shape, side_name, stored_value
from dina_reward.data.tables import OpenedTable, open_table


if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class Labels(NamedTuple):
    """What people said about all pairs of a reader.

    Args:
        p_a: probability that ``a`` is preferred, float32, shape ``(pairs,)``.
        weight: float32, shape ``(pairs,)``.
    """

    p_a: np.ndarray
    weight: np.ndarray


def read_preferences(
    dataset: str | os.PathLike[str] | datasets.Dataset | datasets.DatasetDict,
    *,
    schema: str | None = None,
    split: str = "train",
    image_root: str | os.PathLike[str] | None = None,
    seed: int = 0,
    min_confidence: float | None = None,
    max_pairs_per_prompt: int | None = None,
    max_broken: float = 0.01,
    soft_labels: bool = True,
    dimension: str = "Overall",
    columns: Sequence[str] = (),
) -> PreferenceReader:
    """Opens a preference dataset of any published schema.

    Args:
        dataset: a local folder, a json, jsonl, csv, parquet or arrow file, a `datasets.Dataset`, or the id of a dataset
            on the hub.
        schema: one of `dina_reward.data.schemas.SCHEMAS`; by default the one that the columns fit.
        split: split of a folder, a `datasets.DatasetDict` or a dataset on the hub.
        image_root: folder that relative paths start from; by default the folder of the dataset.
        seed: decides which side of a pair becomes ``a``, and which pairs a limit keeps.
        min_confidence: leaves out pairs whose annotators were less sure; pairs of unknown confidence stay. For vote counts
            the confidence is the majority's share, or what the dataset says.
        max_pairs_per_prompt: leaves out pairs at random where a prompt (a ranking, where there are rankings) has more.
        max_broken: share of broken rows up to which they are left out, counted and reported.
        soft_labels: vote counts become the share of votes; False makes the majority certain (a tie stays 0.5).
        dimension: which judgement of VideoGen-RewardBench to read: VQ, MQ, TA or Overall.
        columns: further columns of the dataset to hand on in `Preference.columns`; of a pair that is stored in two rows,
            those of the row that comes first.

    Raises:
        ValueError: nothing readable there, no schema fits, a column is missing, too many rows are broken, or no pair is
            left.
    """
    _check_options(max_broken, min_confidence, max_pairs_per_prompt, seed, soft_labels, columns)
    opened = open_table(dataset, split)
    if len(opened.dataset) == 0:
        raise ValueError(f"{opened.name} has no rows")
    found = find_schema(opened.dataset.column_names, schema)
    if dimension != "Overall" and dimension not in found.dimensions:
        raise ValueError(f"the schema {found.name!r} has the dimensions {list(found.dimensions)}, not {dimension!r}")
    missing = [name for name in columns if name not in opened.dataset.column_names]
    if missing:
        raise ValueError(
            f"{opened.name} has no column {missing}; it has {', '.join(sorted(opened.dataset.column_names))}"
        )
    typed = Columns(opened.dataset)
    typed.defects.mark_rows(opened.damaged)
    index = found.index(typed, Options(soft_labels, dimension))
    report = typed.defects.report(max_broken)
    report.check()
    kept = _kept_pairs(index, typed, report, min_confidence, max_pairs_per_prompt, seed)
    if len(kept) == 0:
        raise ValueError(f"{opened.name} (schema {found.name!r}) has no pair left:\n{report}")
    if report.count:
        logger.warning("%s: %s", opened.name, report)
    root = opened.folder if image_root is None else Path(image_root)
    return PreferenceReader(opened, found, index, kept, seed, report, root, tuple(columns))


class PreferenceReader(Dataset[Preference]):
    """Pairs of a preference dataset; ``reader[i]`` reads the two sides of pair ``i``.

    Made by `read_preferences`.

    Args:
        opened: the rows.
        schema: their schema.
        index: all pairs.
        kept: numbers of the pairs that are left, shape ``(pairs,)``.
        seed: decides which side becomes ``a``.
        report: what was left out.
        image_root: folder of relative paths.
        columns: further columns to hand on.
    """

    def __init__(
        self,
        opened: OpenedTable,
        schema: Schema,
        index: PairIndex,
        kept: np.ndarray,
        seed: int,
        report: BrokenRows,
        image_root: Path | None,
        columns: tuple[str, ...] = (),
    ) -> None:
        self.name, self.schema, self.report, self.image_root = opened.name, schema.name, report, image_root
        self.pair_numbers, self.columns = kept, columns
        self._index = index
        swapped = swapped_sides(seed, len(index))[kept]
        self._swapped = swapped
        self._first, self._second = index.first.take(kept), index.second.take(kept)
        p_first = np.asarray(index.p_first, np.float64)[kept]
        weight = np.ones(len(kept)) if index.weight is None else index.weight[kept]
        self.labels = Labels(np.where(swapped, 1 - p_first, p_first).astype(np.float32), weight.astype(np.float32))
        self._table = _columns_of(opened.dataset, index, columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self.pair_numbers)

    def __getitem__(self, index: int) -> Preference:
        """Reads a pair.

        Raises:
            BrokenRowError: a side cannot be read (a `ValueError` that names the row and the path).
        """
        (a, b), (table_a, table_b) = self._sides(index)
        first = table_a if not self._swapped[index] else table_b
        prompt, source, group = self._texts(first, index)
        return Preference(
            prompt=prompt,
            a=self._read(a, table_a, index),
            b=self._read(b, table_b, index),
            p_a=float(self.labels.p_a[index]),
            weight=float(self.labels.weight[index]),
            source=source,
            group=group,
            a_name=self._name(a, table_a, index),
            b_name=self._name(b, table_b, index),
            columns=self._further(first),
        )

    def names(self, index: int) -> tuple[str, str]:
        """``a_name`` and ``b_name`` of a pair, without decoding anything."""
        (a, b), (table_a, table_b) = self._sides(index)
        return self._name(a, table_a, index), self._name(b, table_b, index)

    def check(self, index: int) -> None:
        """Reads a pair and forgets it; raises what reading it raises."""
        self[index]

    def readable(self, indices: Iterable[int] | None = None) -> Iterator[Preference]:
        """The pairs that can be read, in order; others are counted in ``report``.

        Args:
            indices: which pairs; all by default.

        Raises:
            ValueError: more than ``max_broken`` of the dataset's rows are broken by now.
        """
        for index in range(len(self)) if indices is None else indices:
            try:
                preference = self[index]
            except BrokenRowError as error:
                self.report.add(error.index, error.reason)
                continue
            yield preference

    def latent_shapes(self) -> np.ndarray | None:
        """Numbers that are equal where published latent shapes are, for both sides, shape ``(pairs, 2)``, int64.

        -1 where a row does not say; ``None`` where the dataset has no such columns.
        """
        numbers: dict[tuple[int, ...], int] = {}
        sides = []
        for side in (self._first, self._second):
            if side.shape_column is None:
                return None
            column = self._table.select_columns([side.shape_column])[:].column(0)
            sides.append(
                np.array([_shape_number(value, numbers) for value in column.to_pylist()], np.int64)[side.rows]
            )
        return np.stack(sides, axis=1)

    @property
    def rankings(self) -> RankingList | None:
        """The rankings as published, ties included and before any filter; None where the dataset has pairs."""
        return None if self._index.rankings is None else RankingList(self._index.rankings, self._ranking)

    def _ranking(self, row: int, rows: np.ndarray, positions: np.ndarray | None, ranks: np.ndarray) -> Ranking:
        rankings = self._index.rankings
        assert rankings is not None
        side = SideIndex(rankings.column, rows, positions)
        tables = [self._table[int(item)] for item in rows]

        def image(item: int) -> Side:
            return self._read(side, tables[item], item)

        names = tuple(self._name(side, table, item) for item, table in enumerate(tables))
        prompt = str(stored_value(tables[0].column(self._index.prompt_column)))
        return Ranking(
            prompt,
            self._group(tables[0], row),
            names,
            tuple(float(rank) for rank in ranks),
            image,
            self._further(tables[0]),
        )

    def _sides(self, index: int) -> tuple[tuple[SideIndex, SideIndex], tuple[pa.Table, pa.Table]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        first, second = int(self._first.rows[index]), int(self._second.rows[index])
        table = self._table[first]
        other = table if second == first else self._table[second]
        if self._swapped[index]:
            return (self._second, self._first), (other, table)
        return (self._first, self._second), (table, other)

    def _texts(self, table: pa.Table, index: int) -> tuple[str, str, str]:
        """Prompt, source and group; ``table`` is the row of the first side."""
        prompt = stored_value(table.column(self._index.prompt_column))
        source = _word(table, "source")
        if not source and self._index.model_columns is not None:
            models = [_word(table, name) for name in self._index.model_columns]
            source = " / ".join(sorted(models)) if all(models) else ""
        return prompt, source or self.schema, self._group(table, int(self._first.rows[index]))

    def _further(self, table: pa.Table) -> dict[str, Any]:
        """The further columns of a row; nothing where one has no value."""
        values = {name: stored_value(table.column(name)) for name in self.columns}
        return {
            name: None if isinstance(v, str) and v.strip().lower() in NO_VALUE else v for name, v in values.items()
        }

    def _group(self, table: pa.Table, row: int) -> str:
        column = self._index.group_column
        return (_word(table, column) if column is not None else "") or str(row)

    def _read(self, side: SideIndex, table: pa.Table, index: int) -> Side:
        options = {}
        try:
            if side.shape_column is not None:
                options["shape"] = stored_value(table.column(side.shape_column))
            return self._index.read(self._stored(side, table, index), self.image_root, **options)
        except ValueError as error:
            raise BrokenRowError(int(side.rows[index]), f"{side.column}: {error}") from error

    def _stored(self, side: SideIndex, table: pa.Table, index: int) -> Any:
        position = None if side.positions is None else int(side.positions[index])
        return stored_value(table.column(side.column), 0, position)

    def _name(self, side: SideIndex, table: pa.Table, index: int) -> str:
        name = "" if side.name_column is None else _word(table, side.name_column)
        try:
            return name or side_name(self._stored(side, table, index))
        except ValueError as error:
            raise BrokenRowError(int(side.rows[index]), f"{side.column}: {error}") from error


def _check_options(
    max_broken: Any, min_confidence: Any, max_pairs_per_prompt: Any, seed: Any, soft_labels: Any, columns: Any
) -> None:
    """Refuses options of `read_preferences` that are of a wrong kind or out of range."""
    for name, value in (("max_broken", max_broken), ("min_confidence", min_confidence)):
        optional = value is None and name == "min_confidence"
        if not optional and not (is_real(value) and 0 <= value <= 1):
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    if max_pairs_per_prompt is not None:
        checked_int("max_pairs_per_prompt", max_pairs_per_prompt, 1)
    checked_int("seed", seed, 0, 2**64 - 1)
    if not isinstance(soft_labels, bool):
        raise ValueError(f"soft_labels must be True or False, got {soft_labels!r}")
    if not isinstance(columns, (list, tuple)) or not all(isinstance(name, str) for name in columns):
        raise ValueError(f"columns must be a list of names, got {columns!r:.80}")


def _kept_pairs(
    index: PairIndex,
    columns: Columns,
    report: BrokenRows,
    min_confidence: float | None,
    max_pairs_per_prompt: int | None,
    seed: int,
) -> np.ndarray:
    """Numbers of the pairs that remain; what goes is counted in the report."""
    broken = columns.defects.broken
    keep = ~(broken[index.first.rows] | broken[index.second.rows])
    report.dropped.update(index.dropped)
    left_out = dict(index.left_out)
    if min_confidence is not None:
        if index.confidence is None:
            raise ValueError("min_confidence is set, but the dataset says nothing about the annotators' confidence")
        left_out[f"confidence below {min_confidence:g}"] = index.confidence < min_confidence
    for what, where in left_out.items():
        report.dropped[what] += int((keep & where).sum())
        keep &= ~where
    kept = np.flatnonzero(keep)
    if max_pairs_per_prompt is not None:
        rows = index.first.rows[kept]
        groups: Any = rows
        if index.group_column is not None:
            groups = columns.text(index.group_column, optional=True).take(pa.array(rows))
        within = within_limit(groups, max_pairs_per_prompt, seed, kept)
        report.dropped[f"more than {max_pairs_per_prompt} pairs of a prompt"] += int((~within).sum())
        kept = kept[within]
    report.dropped += type(report.dropped)()  # forgets zeros
    return kept


def _columns_of(dataset: datasets.Dataset, index: PairIndex, further: Sequence[str]) -> datasets.Dataset:
    """The columns that reading a pair needs, and further ones."""
    names = {index.prompt_column, "source", *(index.model_columns or ()), *further}
    names |= {index.group_column} if index.group_column is not None else set()
    for side in (index.first, index.second):
        names |= {name for name in (side.column, side.name_column, side.shape_column) if name is not None}
    return dataset.select_columns([name for name in dataset.column_names if name in names])


def _shape_number(shape: Any, numbers: dict[tuple[int, ...], int]) -> int:
    """Number of a published shape, a new one for a shape that is not among ``numbers`` yet; -1 for what is no shape."""
    try:
        return -1 if shape is None else numbers.setdefault(published_shape(shape), len(numbers))
    except ValueError:
        return -1


def _word(table: pa.Table, name: str) -> str:
    """Text or number of a column as text; empty where there is no value."""
    if name not in table.column_names:
        return ""
    value = stored_value(table.column(name))
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value)
    return "" if text.strip().lower() in NO_VALUE else text
