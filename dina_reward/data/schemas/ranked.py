"""Schemas with rankings: HPDv2, ImageRewardDB and its benchmark. Every two images of different rank are a pair."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dina_reward.data.columns import Columns, as_mask
from dina_reward.data.pairs import PairIndex, Rankings, pairs_of_rankings
from dina_reward.data.schemas.base import Options, Schema, side_of_rows


def index_hpdv2(columns: Columns, options: Options) -> PairIndex:
    """Pairs of the training file (``file_path``, ``human_preference``) or rankings of the test file.

    HPDv2, arXiv 2306.09341.
    """
    if columns.has("file_path", "human_preference"):
        return _hpdv2_pairs(columns)
    return _ranking_rows(columns, "image_path", "rank")


def index_imagereward(columns: Columns, options: Options) -> PairIndex:
    """One image per row; rows of one ``prompt_id`` make a ranking. Rank 1 is the best.

    ImageRewardDB, arXiv 2304.05977.
    """
    columns.present("image")
    columns.text("prompt")
    ids, ranks = columns.text("prompt_id", optional=True), columns.number("rank")
    columns.defects.mark(as_mask(pc.is_null(ids)), "prompt_id is missing")
    rows = np.flatnonzero(~columns.defects.broken)
    encoded = pc.dictionary_encode(pc.take(pa.chunked_array(ids), pa.array(rows))).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks] or [np.zeros(0, np.int32)])
    order = np.argsort(codes, kind="stable")
    lengths = np.bincount(codes) if len(codes) else np.zeros(0, np.int64)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    rankings = Rankings(offsets, rows[order], None, ranks[rows[order]], "image")
    return pairs_of_rankings(rankings, group_column="prompt_id")


def index_imagereward_benchmark(columns: Columns, options: Options) -> PairIndex:
    """A ranking per row: ``generations`` are paths, ``ranking`` their ranks, lower is better; ties and gaps occur."""
    return _ranking_rows(columns, "generations", "ranking", group_column="id" if columns.has("id") else None)


def _hpdv2_pairs(columns: Columns) -> PairIndex:
    paths, votes = columns.lists("file_path", of_numbers=False), columns.two_numbers("human_preference")
    columns.text("prompt")
    length = np.asarray(pc.fill_null(pc.list_value_length(paths), 2).to_numpy(zero_copy_only=False))
    columns.defects.mark(length != 2, "file_path does not hold two paths", paths)
    columns.defects.mark(np.isnan(votes).any(axis=1), "human_preference is missing")
    columns.defects.mark(((votes != 0) & (votes != 1)).any(axis=1), "human_preference is neither 0 nor 1", votes)
    p_first = (1 + votes[:, 0] - votes[:, 1]) / 2
    first, second = (side_of_rows(columns, "file_path", position) for position in (0, 1))
    return PairIndex(first, second, p_first)


def _ranking_rows(columns: Columns, image_column: str, rank_column: str, group_column: str | None = None) -> PairIndex:
    """Rankings stored as one list of paths and one of ranks per row."""
    paths, ranks = columns.lists(image_column, of_numbers=False), columns.lists(rank_column, of_numbers=True)
    columns.text("prompt")
    lengths = np.asarray(pc.fill_null(pc.list_value_length(paths), 0).to_numpy(zero_copy_only=False))
    others = np.asarray(pc.fill_null(pc.list_value_length(ranks), 0).to_numpy(zero_copy_only=False))
    columns.defects.mark(
        lengths != others, f"{image_column} and {rank_column} differ in length", np.stack([lengths, others], axis=1)
    )
    columns.defects.mark(lengths < 2, f"{image_column} has fewer than two images", lengths)
    rows = np.flatnonzero(~columns.defects.broken)
    lengths = lengths[rows]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    values = pc.list_flatten(ranks.take(pa.array(rows))).to_numpy(zero_copy_only=False)
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    rankings = Rankings(offsets, np.repeat(rows, lengths), positions, values, image_column)
    return pairs_of_rankings(rankings, group_column=group_column)


HPDV2 = Schema("hpdv2", (("prompt", "file_path", "human_preference"), ("prompt", "image_path", "rank")), index_hpdv2)
IMAGEREWARD = Schema("imagereward", (("prompt", "prompt_id", "image", "rank"),), index_imagereward)
IMAGEREWARD_BENCHMARK = Schema(
    "imagereward_benchmark", (("prompt", "generations", "ranking"),), index_imagereward_benchmark
)
