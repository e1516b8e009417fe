"""Schemas whose sides may be latents: TRL's preference format, and the reference's preprocessed latents."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from dina_reward.data.columns import Columns
from dina_reward.data.pairs import PairIndex
from dina_reward.data.schemas.base import Options, Schema, model_columns, share_of_votes, side_of_rows
from dina_reward.data.sides import read_image, read_latent


VOTE_FIELDS = ("votes_chosen", "votes_rejected", "confidence")


def index_trl(columns: Columns, options: Options) -> PairIndex:
    """``chosen`` is preferred, with probability ``p_chosen`` where that column is there; sides are images or latents."""
    for name in ("chosen", "rejected"):
        columns.present(name)
    columns.text("prompt")
    p_first, weight = (
        _optional_number(columns, name, upper) for name, upper in (("p_chosen", 1.0), ("weight", np.inf))
    )
    kinds = [columns.dataset.features.arrow_schema.field(name).type for name in ("chosen", "rejected")]
    is_latent = [_holds_numbers(kind) for kind in kinds]
    if is_latent[0] != is_latent[1]:
        raise ValueError(f"chosen and rejected hold different things: {kinds[0]} and {kinds[1]}")
    return PairIndex(
        side_of_rows(columns, "chosen"),
        side_of_rows(columns, "rejected"),
        p_first,
        weight,
        model_columns=model_columns(columns, "model1", "model2"),
        read=read_latent if is_latent[0] else read_image,
    )


def index_reference_latents(columns: Columns, options: Options) -> PairIndex:
    """``latent1`` is preferred; ``detailed_results`` is the text of a dict with the votes and the confidence.

    The parquet files that the published reward was trained on (DiNa-LRM, arXiv 2602.11146).
    """
    for name in ("latent1", "latent2"):
        columns.present(name)
    columns.text("prompt")
    p_first, confidence = np.ones(columns.rows), None
    if columns.has("detailed_results"):
        details = _details(columns)
        share = share_of_votes(details[:, 0], details[:, 1], options.soft_labels)
        columns.defects.mark(np.any(details < 0, axis=1), "detailed_results has negative numbers", details)
        p_first, confidence = np.where(np.isnan(share), 1.0, share), details[:, 2]
    sides = []
    for number in (1, 2):
        side = side_of_rows(columns, f"latent{number}")
        shape = f"latent{number}_shape"
        sides.append(dataclasses.replace(side, shape_column=shape if columns.has(shape) else None))
    return PairIndex(
        sides[0],
        sides[1],
        p_first,
        confidence=confidence,
        model_columns=model_columns(columns, "model1", "model2"),
        read=read_latent,
    )


def _details(columns: Columns) -> np.ndarray:
    """Votes for and against and the confidence, shape ``(rows, 3)``; NaN where unknown."""
    name = "detailed_results"
    values = np.full((columns.rows, len(VOTE_FIELDS)), np.nan)
    wrong = np.zeros(columns.rows, bool)
    column = columns.text(name, optional=True)
    for row, text in enumerate(column.to_pylist()):
        if text is None:
            continue
        try:
            values[row] = _vote_fields(ast.literal_eval(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            wrong[row] = True
    columns.defects.mark(wrong, f"{name} is not the text of a dict with numbers", column)
    return values


def _vote_fields(details: Any) -> list[float]:
    if not isinstance(details, dict):
        raise TypeError(f"expected a dict, got {type(details).__name__}")
    values = (details.get(field) for field in VOTE_FIELDS)
    return [np.nan if value is None or value == "null" else float(value) for value in values]


def _optional_number(columns: Columns, name: str, upper: float) -> np.ndarray:
    """A column of numbers between 0 and ``upper``; 1 where it is not there or has no value."""
    if not columns.has(name):
        return np.ones(columns.rows)
    values = columns.number(name, optional=True, nan_is_missing=False)
    outside = (values < 0) | (values > upper)
    columns.defects.mark(outside, f"{name} is not between 0 and {upper:g}", values)
    return np.where(np.isnan(values) | outside, 1.0, values)


def _holds_numbers(kind: pa.DataType) -> bool:
    """Whether an Arrow type is a (nested) list, as latents are."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


TRL = Schema("trl", (("prompt", "chosen", "rejected"),), index_trl)
REFERENCE_LATENTS = Schema("reference_latents", (("prompt", "latent1", "latent2"),), index_reference_latents)
