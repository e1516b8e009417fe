"""A latent cache of latents that exist already, such as samples of a generator, with pairs over them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from dina_reward.data.arrow_files import TensorColumn, fixed_column, open_arrow, tensor_bytes, write_arrow
from dina_reward.data.buckets import Bucket, BucketRule
from dina_reward.data.cache import PAIRS_NAME
from dina_reward.data.cache_encode import shard_path
from dina_reward.data.cache_manifest import MANIFEST_NAME, CacheSettings, begin_manifest, write_manifest


@dataclass(frozen=True)
class LatentPair:
    """A pair of a `LatentCacheWriter`.

    Args:
        prompt: text both latents were made for.
        chosen, rejected: numbers of the latents in the cache.
        p_chosen: probability that ``chosen`` is preferred.
        weight: factor of the pair's loss.
        source: where the pair comes from.
        group: id of what pairs have in common that are not independent.
        scores: what a judge scored the two, where it did.
    """

    prompt: str
    chosen: int
    rejected: int
    p_chosen: float
    weight: float = 1.0
    source: str = ""
    group: str = ""
    scores: tuple[float, float] | None = None


class LatentCacheWriter:
    """Writes latents of one size, shard by shard, and at the end the pairs: a cache that `CachedPreferences` reads.

    Each shard appears whole or not at all; a writer that finds some of them goes on with the others. What the cache was
    made from is compared with what is there.

    Args:
        directory: a new directory, or one that a writer with the same arguments began.
        bucket: size of the images in pixels.
        latent_shape: shape of one latent.
        count: latents that there will be.
        origin: what the latents and pairs depend on, as JSON has it.
        latents_per_shard: latents of one file.
        dtype: stored dtype; ``"float32"`` keeps latents of every dtype exactly.

    Raises:
        ValueError: the directory holds something else.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        bucket: Bucket,
        latent_shape: Sequence[int],
        count: int,
        origin: Mapping[str, Any],
        *,
        latents_per_shard: int = 256,
        dtype: str = "float32",
    ) -> None:
        self.directory, self.bucket, self.latent_shape, self.count = (
            Path(directory),
            bucket,
            tuple(latent_shape),
            count,
        )
        self.settings = CacheSettings(BucketRule((bucket,)), latent_dtype=dtype, images_per_shard=latents_per_shard)
        content = {
            "pipeline": origin.get("pipeline", {}),
            "dataset": {"latents": count, "shape": list(latent_shape), **origin},
            "settings": self.settings.to_json(),
        }
        self.manifest = begin_manifest(self.directory / MANIFEST_NAME, content)

    @property
    def complete(self) -> bool:
        """Whether the pairs are written too."""
        return bool(self.manifest["complete"])

    def shards(self) -> list[range]:
        """Numbers of the latents of each shard."""
        size = self.settings.images_per_shard
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]

    def missing(self) -> list[int]:
        """Shards that are not written yet."""
        return [number for number in range(len(self.shards())) if not self._path(number).exists()]

    def write(self, number: int, latents: Tensor) -> None:
        """Writes one shard.

        Raises:
            ValueError: latents of another number or shape, or values that are not finite in the stored dtype.
        """
        expected = (len(self.shards()[number]), *self.latent_shape)
        if tuple(latents.shape) != expected:
            raise ValueError(f"shard {number} needs latents of shape {expected}, got {tuple(latents.shape)}")
        rows = [tensor_bytes(latent, self.settings.latent_dtype) for latent in latents]
        names = pa.array([f"sample {item}" for item in self.shards()[number]], pa.large_string())
        metadata = {"bucket": str(self.bucket), "dtype": self.settings.latent_dtype}
        write_arrow(self._path(number), {"name": names, "latents": fixed_column(rows, len(rows[0]))}, metadata)

    def read(self, items: Sequence[int]) -> Tensor:
        """Latents by their numbers, shape ``(len(items), ...)``, float32.

        Raises:
            ValueError: a shard is missing or damaged.
        """
        columns: dict[int, TensorColumn] = {}
        rows = []
        for item in items:
            number, offset = divmod(item, self.settings.images_per_shard)
            if number not in columns:
                batch = open_arrow(self._path(number))
                stored = self.settings.latent_dtype
                columns[number] = TensorColumn(batch, "latents", self.latent_shape, stored, torch.float32)
            rows.append(columns[number][offset])
        return torch.stack(rows) if rows else torch.empty(0, *self.latent_shape)

    def finish(self, pairs: Sequence[LatentPair], report: Mapping[str, Any]) -> None:
        """Writes the pairs and completes the manifest.

        Args:
            pairs: over the latents.
            report: what to say of them in the manifest, as JSON has it.

        Raises:
            ValueError: there are no pairs, or a shard is missing.
        """
        if not pairs or self.missing():
            raise ValueError(f"{self.directory} has {len(pairs)} pairs and lacks the shards {self.missing()[:8]}")
        texts = {name: pa.array([getattr(p, name) for p in pairs], pa.large_string()) for name in _TEXTS}
        columns = {**texts, **{name: pa.array([getattr(p, name) for p in pairs], kind) for name, kind in _NUMBERS}}
        prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
        columns["bucket"] = pa.array([0] * len(pairs), pa.int16())
        columns["prompt_item"] = pa.array([prompts[pair.prompt] for pair in pairs], pa.int64())
        columns["row"] = pa.array(range(len(pairs)), pa.int64())
        if any(pair.scores is not None for pair in pairs):
            nothing = (float("nan"), float("nan"))
            for place, name in enumerate(("score_chosen", "score_rejected")):
                columns[name] = pa.array([(pair.scores or nothing)[place] for pair in pairs], pa.float64())
        write_arrow(self.directory / PAIRS_NAME, columns)
        shapes = {str(self.bucket): list(self.latent_shape)}
        self.manifest = {**self.manifest, "complete": True, "latent_shapes": shapes, "report": dict(report)}
        write_manifest(self.directory / MANIFEST_NAME, self.manifest)

    def _path(self, number: int) -> Path:
        return shard_path(self.directory, self.bucket, number)


_TEXTS = ("prompt", "source", "group")
_NUMBERS = (("p_chosen", pa.float64()), ("weight", pa.float64()), ("chosen", pa.int64()), ("rejected", pa.int64()))
