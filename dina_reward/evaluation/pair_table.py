"""What an evaluation knows of each pair besides its scores: label, prompt, ranking, source, resolution, further columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dina_reward.data.preference import Preference
from dina_reward.data.records import PreferencePair, check_columns
from dina_reward.evaluation.columns import plain_columns, select_columns, text_of


OWN_COLUMNS = ("prompt", "source", "group", "resolution")
"""Columns that every table of pairs has, if only as empty text."""


@dataclass
class PairTable:
    """Labels of pairs, one entry for each, in the order of the dataset.

    Args:
        prompts, sources, groups, resolutions: text; empty where the dataset does not say.
        p_a: labels in ``[0, 1]``.
        a, b: rows of the two sides among the samples.
        names: ids of the two sides, empty where the dataset has none.
        further: by name, further columns of the dataset that cells are made of.
    """

    prompts: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    resolutions: list[str] = field(default_factory=list)
    p_a: list[float] = field(default_factory=list)
    a: list[int] = field(default_factory=list)
    b: list[int] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)
    further: dict[str, list[object]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.p_a)

    @property
    def labels(self) -> Tensor:
        """Labels, shape ``(pairs,)``, float64, so that a tie stays exactly one half."""
        return torch.tensor(self.p_a, dtype=torch.float64)

    @property
    def clusters(self) -> list[object]:
        """What belongs together when pairs are resampled: the prompt; the group, or the pair, where there is none."""
        rows = zip(self.prompts, self.groups, strict=True)
        return [prompt or group or number for number, (prompt, group) in enumerate(rows)]

    @property
    def columns(self) -> dict[str, Sequence[object]]:
        """What pairs can be grouped by, one value per pair."""
        own = zip(OWN_COLUMNS, (self.prompts, self.sources, self.groups, self.resolutions), strict=True)
        return {**self.further, **dict(own)}

    def margins(self, scores: Tensor) -> Tensor:
        """Score of ``a`` minus score of ``b``, shape ``(pairs, settings)``, from ``(samples, settings)``."""
        return scores[self.a] - scores[self.b]

    def add(self, pair: Preference, bucket: str, rows: tuple[int, int], columns: Sequence[str] = ()) -> None:
        """Appends a pair whose sides are the samples ``rows``, with these further columns where it has them.

        Raises:
            ValueError: the first pair lacks one of the columns; the message names those there are.
        """
        if not len(self):
            select_columns(columns, dict.fromkeys((*pair.columns, *OWN_COLUMNS), ()))
        for name in columns:
            if name not in OWN_COLUMNS:
                self.further.setdefault(name, []).append(pair.columns.get(name))
        self.prompts.append(pair.prompt)
        self.sources.append(pair.source)
        self.groups.append(pair.group)
        self.resolutions.append(bucket or resolution(pair.a, pair.b))
        self.p_a.append(pair.p_a)
        self.a.append(rows[0])
        self.b.append(rows[1])
        self.names.append((pair.a_name, pair.b_name))

    def incomplete_rankings(self) -> int:
        """Groups that do not hold each pair of their images once; their share of inversions is over the pairs present."""
        pairs: dict[str, list[frozenset[str]]] = {}
        for group, names in zip(self.groups, self.names, strict=True):
            pairs.setdefault(group, []).append(frozenset(names))
        count = 0
        for found in pairs.values():
            images = len(frozenset().union(*found))
            count += len(set(found)) != len(found) or len(found) != images * (images - 1) // 2
        return count


def as_preference(record: Preference | Mapping[str, Any]) -> tuple[Preference, str]:
    """A canonical record and its bucket (empty for none), from one, or from a row of training data.

    Rows have ``prompt``, ``chosen``, ``rejected`` (latents or images) and optionally ``p_chosen``, ``weight``, ``source``,
    ``group``, ``bucket``, ``chosen_name`` and ``rejected_name``; what else they have are the record's further columns.

    Raises:
        ValueError: the row is unusable.
    """
    if isinstance(record, Preference):
        return record, ""
    check_columns(record.keys())
    texts = {name: text_of(record.get(name)) for name in ("source", "group", "bucket", "chosen_name", "rejected_name")}
    common: dict[str, Any] = {
        "columns": {name: value for name, value in plain_columns(record).items() if name not in texts},
        "source": texts["source"],
        "group": texts["group"],
        "a_name": texts["chosen_name"],
        "b_name": texts["rejected_name"],
    }
    if isinstance(record["chosen"], Image.Image) and isinstance(record["rejected"], Image.Image):
        p_a, weight = (1.0 if record.get(name) is None else float(record[name]) for name in ("p_chosen", "weight"))
        return Preference(record["prompt"], record["chosen"], record["rejected"], p_a, weight, **common), texts[
            "bucket"
        ]
    row = PreferencePair.from_record(record)
    return Preference(row.prompt, row.chosen, row.rejected, row.p_chosen, row.weight, **common), texts["bucket"]


def resolution(a: Any, b: Any) -> str:
    """Size of a pair as width x height: pixels of images, ``latent 8x8`` for latents, both where they differ."""
    sizes = sorted({_size(side) for side in (a, b)})
    return " and ".join(sizes)


def _size(side: Any) -> str:
    if isinstance(side, Image.Image):
        return f"{side.width}x{side.height}"
    if isinstance(side, Tensor):
        return "latent " + "x".join(str(length) for length in (*side.shape[1:-2], side.shape[-1], side.shape[-2]))
    return "video"
