"""The index of a preference dataset: for every pair where its sides are and what people said, as arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dina_reward.data.sides import Side, read_image


SIDES_STREAM, LIMIT_STREAM = 0, 1


@dataclass(frozen=True)
class SideIndex:
    """Where one side of every pair is stored.

    Args:
        column: column of the dataset.
        rows: row of each pair's side, shape ``(pairs,)``.
        positions: place inside the row's list, shape ``(pairs,)``, where the column holds lists.
        name_column: column of the side's stable id, where there is one.
        shape_column: column of a latent's published shape, where there is one.
    """

    column: str
    rows: np.ndarray
    positions: np.ndarray | None = None
    name_column: str | None = None
    shape_column: str | None = None

    def take(self, pairs: np.ndarray) -> SideIndex:
        positions = None if self.positions is None else self.positions[pairs]
        return SideIndex(self.column, self.rows[pairs], positions, self.name_column, self.shape_column)


@dataclass(frozen=True)
class Rankings:
    """Rankings as flat arrays: ranking ``k`` owns the items ``offsets[k]`` to ``offsets[k + 1]``.

    Args:
        offsets: shape ``(rankings + 1,)``.
        rows, positions: where each item is stored, shape ``(items,)``; no positions where an item is a row.
        ranks: lower is better, shape ``(items,)``.
        column: column of the images.
    """

    offsets: np.ndarray
    rows: np.ndarray
    positions: np.ndarray | None
    ranks: np.ndarray
    column: str


@dataclass(frozen=True)
class PairIndex:
    """All pairs of a dataset in published order, before sides are randomised and filters apply.

    Args:
        first, second: the sides.
        p_first: probability that ``first`` is preferred, shape ``(pairs,)``.
        weight: shape ``(pairs,)``; ones by default.
        confidence: how sure the annotators are, shape ``(pairs,)``, NaN where unknown; None where the schema has none.
        left_out: for kinds of pairs that are left out on purpose, which ones: boolean, shape ``(pairs,)``.
        dropped: counts of what is left out before there are pairs.
        prompt_column: column of the prompts, read at the row of ``first``.
        group_column: column of the group's id; None: the row's number.
        model_columns: columns of the two generators, where there are some.
        read: turns what is stored into a side.
        rankings: the rankings that the pairs were made from, where the dataset has rankings.
    """

    first: SideIndex
    second: SideIndex
    p_first: np.ndarray
    weight: np.ndarray | None = None
    confidence: np.ndarray | None = None
    left_out: dict[str, np.ndarray] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    prompt_column: str = "prompt"
    group_column: str | None = "prompt"
    model_columns: tuple[str, str] | None = None
    read: Callable[..., Side] = read_image
    rankings: Rankings | None = None

    def __len__(self) -> int:
        return len(self.p_first)


def pairs_of_rankings(rankings: Rankings, **options: Any) -> PairIndex:
    """Every two items of a ranking whose ranks differ, in the order of the items; equal ranks are left out, counted.

    Args:
        rankings: the rankings.
        options: further fields of `PairIndex`.
    """
    lengths = np.diff(rankings.offsets)
    ends = np.repeat(rankings.offsets[1:], lengths)
    items = np.arange(len(rankings.rows))
    starts, others = [], []
    for distance in range(1, int(lengths.max(initial=1))):
        first = items[items + distance < ends]
        starts.append(first)
        others.append(first + distance)
    first = np.concatenate(starts) if starts else np.zeros(0, np.int64)
    second = np.concatenate(others) if others else np.zeros(0, np.int64)
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    tied = rankings.ranks[first] == rankings.ranks[second]
    dropped = Counter({"equal ranks in a ranking": int(tied.sum())}) if tied.any() else Counter()
    first, second = first[~tied], second[~tied]

    def side(chosen: np.ndarray) -> SideIndex:
        positions = None if rankings.positions is None else rankings.positions[chosen]
        return SideIndex(rankings.column, rankings.rows[chosen], positions)

    p_first = (rankings.ranks[first] < rankings.ranks[second]).astype(np.float32)
    return PairIndex(side(first), side(second), p_first, dropped=dropped, rankings=rankings, **options)


def swapped_sides(seed: int, pairs: int) -> np.ndarray:
    """Which pairs show their second side as ``a``: a fair coin that depends on the seed and the pair's number only.

    Raises:
        ValueError: the seed is negative.
    """
    return _random_bits(seed, SIDES_STREAM, pairs) >> np.uint64(63) == 1


def within_limit(groups: pa.ChunkedArray | np.ndarray, limit: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Keeps at most ``limit`` pairs of each group, chosen at random by the seed and the pairs' numbers.

    Args:
        groups: group of each pair, shape ``(pairs,)``.
        limit: pairs to keep.
        seed: of the choice.
        numbers: number of each pair, shape ``(pairs,)``.

    Returns:
        Boolean, shape ``(pairs,)``.
    """
    if len(numbers) == 0:
        return np.zeros(0, bool)
    codes = np.unique(groups, return_inverse=True)[1] if isinstance(groups, np.ndarray) else _codes(groups)
    priority = _random_bits(seed, LIMIT_STREAM, int(numbers.max()) + 1)[numbers]
    order = np.lexsort((numbers, priority, codes))
    place = np.arange(len(order))
    begins = np.concatenate(([True], np.diff(codes[order]) != 0))
    place -= np.maximum.accumulate(np.where(begins, place, 0))
    keep = np.empty(len(order), bool)
    keep[order] = place < limit
    return keep


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Integer codes of the distinct values of a column."""
    encoded = pc.dictionary_encode(column, null_encoding="encode").unify_dictionaries()
    return np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])


def _random_bits(seed: int, stream: int, count: int) -> np.ndarray:
    """64 random bits for each number from 0; a counter-based generator whose raw output numpy keeps across versions."""
    if seed < 0:
        raise ValueError(f"the seed must not be negative, got {seed}")
    return np.random.Philox(key=(seed << 8) + stream).random_raw(count)
