"""Reading a latent cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dina_reward.data.arrow_files import RaggedColumn, TensorColumn, numbers, open_arrow
from dina_reward.data.buckets import Bucket
from dina_reward.data.cache import PAIRS_NAME
from dina_reward.data.cache_encode import shard_path
from dina_reward.data.cache_manifest import check_readable, read_manifest
from dina_reward.data.records import SCORE_COLUMNS


class CachedPreferences(Dataset[dict[str, Any]]):
    """Preferences of a latent cache, map-style; nothing is in memory but what a row needs.

    A row is a preference record (`dina_reward.data.records`) with further keys:

    | key | content |
    |---|---|
    | ``prompt``, ``source``, ``group`` | text |
    | ``chosen``, ``rejected`` | latents of one shape, ``(channels, height, width)`` |
    | ``p_chosen``, ``weight`` | numbers |
    | ``score_chosen``, ``score_rejected`` | if stored: what a judge scored the two, NaN where it scored neither |
    | ``bucket`` | size of the images in pixels, ``"WIDTHxHEIGHT"`` |
    | ``prompt_embeds`` | if stored: ``(tokens, channels)``, without padding |
    | ``pooled_prompt_embeds`` | if stored and the model takes them: ``(channels,)`` |
    | ``prompt_embeds_mask`` | if stored and the model masks padding: ``(tokens,)``, bool |

    Latents differ in shape between buckets; `dina_reward.data.BucketBatchSampler` makes batches of one bucket.
    Objects may be pickled into data loader workers, which map the files anew.

    Examples:
        >>> rows = CachedPreferences("cache")
        >>> sampler = BucketBatchSampler(rows.bucket_of, batch_size=4, seed=0, num_replicas=1, rank=0)
        >>> loader = DataLoader(rows, batch_sampler=sampler, collate_fn=collate_preferences)

    Args:
        directory: a finished cache, written by `build_cache`.
        dtype: of the latents and embeddings in the rows; ``None`` for the stored one.

    Raises:
        ValueError: there is no cache, it is unfinished, or a file is missing or damaged.
    """

    def __init__(self, directory: str | os.PathLike[str], *, dtype: torch.dtype | None = torch.float32) -> None:
        self.directory, self.dtype = Path(directory), dtype
        self.manifest = read_manifest(self.directory)
        if self.manifest.get("complete") is False:
            raise ValueError(f"the latent cache in {directory} is unfinished; run the command that began it once more")
        check_readable(self.manifest, self.directory)
        settings = self.manifest["settings"]
        self._bucket_names = list(settings["buckets"])
        self.buckets = tuple(map(Bucket.parse, self._bucket_names))
        self.has_prompt_embeds = bool(settings["prompt_embeds"])
        self._images_per_shard, self._prompts_per_shard = settings["images_per_shard"], settings["prompts_per_shard"]
        self._shapes = [tuple(self.manifest["latent_shapes"][str(bucket)]) for bucket in self.buckets]
        self._open()

    def _open(self) -> None:
        batch = open_arrow(self.directory / PAIRS_NAME)
        self._texts = {name: batch.column(name) for name in ("prompt", "source", "group")}
        names = ("p_chosen", "weight", "bucket", "chosen", "rejected", "prompt_item")
        scores = [name for name in SCORE_COLUMNS if name in batch.schema.names]
        self._numbers = {name: numbers(batch, name) for name in (*names, *scores)}
        self._latents: dict[tuple[int, int], TensorColumn] = {}
        self._prompts: dict[int, dict[str, RaggedColumn]] = {}

    def __getstate__(self) -> dict[str, Any]:
        mapped = ("_texts", "_numbers", "_latents", "_prompts")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.bucket_of)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        """Digest of what the cache was made from and of its pairs, by which a training run knows its dataset again."""
        made = {name: self.manifest[name] for name in ("dataset", "pipeline", "settings")}
        digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
        for name in sorted(self._numbers):
            digest.update(self._numbers[name].tobytes())
        return digest.hexdigest()

    @property
    def bucket_of(self) -> np.ndarray:
        """For every row the position of its bucket in ``buckets``, shape ``(rows,)``, int16, read-only."""
        return self._numbers["bucket"]

    @property
    def labels(self) -> tuple[np.ndarray, np.ndarray]:
        """``p_chosen`` and ``weight`` of all rows, without reading a latent; float64, read-only."""
        return self._numbers["p_chosen"], self._numbers["weight"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads a row; negative positions count from the end.

        Raises:
            IndexError: there is no such row.
            ValueError: a file is missing or damaged.
        """
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of a cache with {len(self)} rows")
        bucket = int(self._numbers["bucket"][row])
        result: dict[str, Any] = {name: column[row].as_py() for name, column in self._texts.items()}
        for side in ("chosen", "rejected"):
            result[side] = self._latent(bucket, int(self._numbers[side][row]))
        result["p_chosen"] = float(self._numbers["p_chosen"][row])
        result["weight"] = float(self._numbers["weight"][row])
        result |= {name: float(self._numbers[name][row]) for name in SCORE_COLUMNS if name in self._numbers}
        result["bucket"] = self._bucket_names[bucket]
        if self.has_prompt_embeds:
            result.update(self._embeds(int(self._numbers["prompt_item"][row])))
        return result

    def _latent(self, bucket: int, item: int) -> Tensor:
        number, offset = divmod(item, self._images_per_shard)
        column = self._latents.get((bucket, number))
        if column is None:
            batch = open_arrow(shard_path(self.directory, self.buckets[bucket], number))
            stored = self.manifest["settings"]["latent_dtype"]
            column = TensorColumn(batch, "latents", self._shapes[bucket], stored, self.dtype)
            self._latents[bucket, number] = column
        return column[offset]

    def _embeds(self, item: int) -> dict[str, Tensor]:
        number, offset = divmod(item, self._prompts_per_shard)
        columns = self._prompts.get(number)
        if columns is None:
            columns = self._prompts[number] = self._open_prompts(number)
        return {name: column[offset] for name, column in columns.items()}

    def _open_prompts(self, number: int) -> dict[str, RaggedColumn]:
        batch = open_arrow(shard_path(self.directory, None, number))
        stored, channels = self.manifest["settings"]["embeds_dtype"], int(batch.schema.metadata[b"channels"])
        kinds = {
            "prompt_embeds": (stored, channels),
            "pooled_prompt_embeds": (stored, None),
            "prompt_embeds_mask": ("bool", None),
        }
        return {
            name: RaggedColumn(batch, name, *kind, dtype=self.dtype)
            for name, kind in kinds.items()
            if name in batch.schema.names
        }
