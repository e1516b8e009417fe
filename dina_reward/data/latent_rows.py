"""Training rows of a published dataset of latents, such as the one that DiNa-LRM was trained on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dina_reward.data.broken import BrokenRowError
from dina_reward.data.readers import PreferenceReader


logger = logging.getLogger(__name__)


class LatentRows(Dataset[dict[str, Any]]):
    """The pairs of a reader as preference records, read one by one; batches come from one latent shape each.

    Where the dataset publishes shapes, ``bucket_of`` numbers them, and pairs of two shapes (or of an unknown one) are left
    out and counted. A row that proves broken when it is read is counted in the reader's report; another pair of its shape
    takes its place with weight 0, so that it adds nothing to the loss.

    Examples:
        >>> rows = LatentRows(read_preferences("latents/index.csv", min_confidence=0.95, max_pairs_per_prompt=8))

    Args:
        reader: from `read_preferences`.

    Raises:
        ValueError: the dataset holds images or videos, or no pair is left.
    """

    def __init__(self, reader: PreferenceReader) -> None:
        self.reader = reader
        first = next(reader.readable(), None)
        if first is None or not isinstance(first.a, Tensor):
            kind = "no readable pair" if first is None else f"sides of type {type(first.a).__name__}"
            raise ValueError(f"{reader.name} has {kind}, not latents; make latents of images with dina-reward cache")
        shapes = reader.latent_shapes()
        self._pairs, self.bucket_of = np.arange(len(reader)), None
        if shapes is not None:
            self._pairs = np.flatnonzero((shapes[:, 0] == shapes[:, 1]) & (shapes[:, 0] >= 0))
            self.bucket_of = shapes[self._pairs, 0]
        if len(self._pairs) < len(reader):
            reader.report.dropped["latents of two shapes or of an unknown one"] += len(reader) - len(self._pairs)
            logger.warning("%s: %s", reader.name, reader.report)
        if not len(self._pairs):
            raise ValueError(f"{reader.name} has no pair of latents of one shape")

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        """Digest of which rows of the reader there are, by which a training run knows its dataset again."""
        digest = hashlib.sha256(self._pairs.tobytes())
        digest.update(b"" if self.bucket_of is None else self.bucket_of.tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads a row.

        Raises:
            ValueError: more rows are broken than the reader allows.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first = index % len(self)
        weight: dict[str, float] = {}
        for candidate in self._like(first):
            try:
                return {**self.reader[int(self._pairs[candidate])].training_row(), **weight}
            except BrokenRowError as error:
                self.reader.report.add(error.index, error.reason)
                logger.warning("%s: left out %s", self.reader.name, error)
                weight = {"weight": 0.0}
        raise ValueError(f"{self.reader.name} has no readable pair of the shape of row {index}")

    def _like(self, index: int) -> Iterator[int]:
        """The row, and those of its shape behind it, all around."""
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self.bucket_of is None or self.bucket_of[candidate] == self.bucket_of[index]:
                yield candidate
