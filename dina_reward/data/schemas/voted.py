"""Schemas with one comparison per row: HPDv3, Pick-a-Pic, GenAI-Bench, VideoGen-RewardBench and vote counts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dina_reward.data.columns import Columns, as_mask
from dina_reward.data.pairs import PairIndex
from dina_reward.data.schemas.base import Options, Schema, model_columns, share_of_votes, side_of_rows
from dina_reward.data.sides import read_video


def index_hpdv3(columns: Columns, options: Options) -> PairIndex:
    """``path1`` is always the preferred image; ``choice_dist`` counts the votes, where there are some.

    HPDv3, arXiv 2508.03789. The larger count belongs to ``path1``, whatever its place.
    """
    for name in ("path1", "path2"):
        columns.present(name)
    columns.text("prompt")
    p_first = np.ones(columns.rows)
    if columns.has("choice_dist") and options.soft_labels:
        votes = columns.two_numbers("choice_dist")
        share = share_of_votes(votes.max(axis=1), votes.min(axis=1), soft=True)
        columns.defects.mark(np.any(votes < 0, axis=1), "choice_dist has negative votes")
        p_first = np.where(np.isnan(share), 1.0, share)
    confidence = columns.number("confidence", optional=True) if columns.has("confidence") else None
    return PairIndex(
        side_of_rows(columns, "path1"),
        side_of_rows(columns, "path2"),
        p_first,
        confidence=confidence,
        model_columns=model_columns(columns, "model1", "model2"),
    )


def index_pickapic(columns: Columns, options: Options) -> PairIndex:
    """Labels 1, 0 and 0.5 for ties; each prompt weighs the same: 1 / ``num_example_per_prompt``.

    Pick-a-Pic, arXiv 2305.01569. Rows without a label, and pairs of one and the same image, are left out.
    """
    for name in ("jpg_0", "jpg_1"):
        columns.present(name)
    columns.text("caption")
    left_out = {}
    for name, wanted, meaning in (("has_label", 0, "no label"), ("are_different", 0, "one image twice")):
        if columns.has(name):
            left_out[meaning] = columns.number(name, optional=True) == wanted
    labels = np.stack([columns.number(name, optional=True) for name in ("label_0", "label_1")], axis=1)
    unlabelled = left_out.get("no label", np.zeros(columns.rows, bool))
    columns.defects.mark(np.isnan(labels).any(axis=1) & ~unlabelled, "label_0 or label_1 is missing")
    sums = np.abs(labels.sum(axis=1) - 1) > 1e-6
    wrong = (sums | (labels < 0).any(axis=1)) & ~np.isnan(labels).any(axis=1) & ~unlabelled
    columns.defects.mark(wrong, "label_0 and label_1 are no shares of one", labels)
    weight = None
    if columns.has("num_example_per_prompt"):
        examples = columns.number("num_example_per_prompt", optional=True)
        columns.defects.mark(examples <= 0, "num_example_per_prompt is not positive", examples)
        weight = 1 / np.where(np.isnan(examples) | (examples <= 0), 1, examples)
    return PairIndex(
        side_of_rows(columns, "jpg_0", name_column="image_0_uid"),
        side_of_rows(columns, "jpg_1", name_column="image_1_uid"),
        np.where(unlabelled, 0.5, labels[:, 0]),
        weight,
        left_out=left_out,
        prompt_column="caption",
        group_column="caption",
        model_columns=model_columns(columns, "model_0", "model_1"),
    )


def index_genai_bench(columns: Columns, options: Options) -> PairIndex:
    """``vote_type`` is leftvote, rightvote, tievote or bothbad_vote; what says "both bad" is left out.

    GenAI Arena, arXiv 2406.04485.
    """
    for name in ("left_image", "right_image"):
        columns.present(name)
    columns.text("prompt")
    votes = pc.replace_substring_regex(pc.utf8_lower(columns.text("vote_type")), "[ _-]?vote$", "")
    p_first = _labels(columns, "vote_type", votes, {"left": 1.0, "right": 0.0, "tie": 0.5, "bothbad": 0.5})
    return PairIndex(
        side_of_rows(columns, "left_image"),
        side_of_rows(columns, "right_image"),
        p_first,
        left_out={"both bad": as_mask(pc.equal(votes, "bothbad"))},
        model_columns=model_columns(columns, "left_model", "right_model"),
    )


def index_videogen_rewardbench(columns: Columns, options: Options) -> PairIndex:
    """Sides are video files; each dimension (VQ, MQ, TA, Overall) says A, B or same.

    VideoAlign, arXiv 2501.13918.
    """
    if not columns.has(options.dimension):
        raise ValueError(f"the dataset has no dimension {options.dimension!r}; it has {columns.dataset.column_names}")
    for name in ("path_A", "path_B"):
        columns.present(name)
    columns.text("prompt")
    votes = pc.utf8_lower(pc.utf8_trim_whitespace(columns.text(options.dimension)))
    return PairIndex(
        side_of_rows(columns, "path_A"),
        side_of_rows(columns, "path_B"),
        _labels(columns, options.dimension, votes, {"a": 1.0, "b": 0.0, "same": 0.5}),
        model_columns=model_columns(columns, "A_model", "B_model"),
        read=read_video,
    )


def index_rapidata(columns: Columns, options: Options) -> PairIndex:
    """``votes_image1`` and ``votes_image2`` count the votes."""
    for name in ("image1", "image2"):
        columns.present(name)
    columns.text("prompt")
    first, second = (columns.number(name) for name in ("votes_image1", "votes_image2"))
    columns.defects.mark((first < 0) | (second < 0), "negative votes")
    columns.defects.mark(first + second == 0, "no votes")
    share = share_of_votes(first, second, soft=True)
    return PairIndex(
        side_of_rows(columns, "image1"),
        side_of_rows(columns, "image2"),
        share_of_votes(first, second, options.soft_labels),
        confidence=np.maximum(share, 1 - share),
        model_columns=model_columns(columns, "model1", "model2"),
    )


def _labels(columns: Columns, name: str, votes: pa.ChunkedArray, meaning: dict[str, float]) -> np.ndarray:
    """Turns words into probabilities; other words are defects."""
    place = pc.index_in(votes, pa.array(list(meaning), votes.type))
    columns.defects.mark(as_mask(pc.is_null(place)), f"{name} is none of {list(meaning)}", votes)
    values = np.array(list(meaning.values()))
    return values[np.asarray(pc.fill_null(place, 0).to_numpy())]


HPDV3 = Schema("hpdv3", (("prompt", "path1", "path2"),), index_hpdv3)
PICKAPIC = Schema("pickapic", (("caption", "jpg_0", "jpg_1", "label_0", "label_1"),), index_pickapic)
GENAI_BENCH = Schema("genai_bench", (("prompt", "left_image", "right_image", "vote_type"),), index_genai_bench)
VIDEOGEN_REWARDBENCH = Schema(
    "videogen_rewardbench",
    (("prompt", "path_A", "path_B"),),
    index_videogen_rewardbench,
    ("VQ", "MQ", "TA", "Overall"),
)
RAPIDATA = Schema("rapidata", (("prompt", "image1", "image2", "votes_image1", "votes_image2"),), index_rapidata)
