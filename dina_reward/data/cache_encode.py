"""Encodes the shards of a latent cache: images of one bucket, or prompts, in batches that depend on the shard alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from dina_reward.data.arrow_files import fixed_column, tensor_bytes, write_arrow
from dina_reward.data.buckets import Bucket, fit_image
from dina_reward.data.cache_index import BucketItems, CachePlan, PairSource, shard_name, shard_ranges, side_image
from dina_reward.data.cache_manifest import CacheSettings
from dina_reward.families import Conditioning, ModelFamily


LATENTS_FOLDER = "latents"
PROMPTS_FOLDER = "prompts"
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ShardTask:
    """One file to encode.

    Args:
        path: the file.
        bucket: position of the bucket in the rule; ``None`` for prompts.
        items: range of the bucket's images, or of the prompts.
    """

    path: Path
    bucket: int | None
    items: range


def shard_path(directory: Path, bucket: Bucket | None, number: int) -> Path:
    """File of a shard of latents, or of prompts without a bucket."""
    folder = directory / PROMPTS_FOLDER if bucket is None else directory / LATENTS_FOLDER / str(bucket)
    return folder / shard_name(number)


def shard_tasks(directory: Path, plan: CachePlan, settings: CacheSettings) -> list[ShardTask]:
    """All files of a cache in a fixed order: latents bucket by bucket, then prompts."""
    tasks = [
        ShardTask(shard_path(directory, bucket, number), position, items)
        for position, bucket in enumerate(settings.rule.buckets)
        for number, items in enumerate(shard_ranges(len(plan.items[position]), settings.images_per_shard))
    ]
    if settings.prompt_embeds:
        ranges = shard_ranges(len(plan.prompts), settings.prompts_per_shard)
        tasks += [ShardTask(shard_path(directory, None, n), None, items) for n, items in enumerate(ranges)]
    return tasks


class ShardEncoder:
    """Writes shards.

    Args:
        pipeline: diffusers pipeline whose VAE (and text encoders) are on their device.
        family: its model family.
        preferences: the dataset.
        settings: of the cache.
        plan: of the cache.
        pool: threads that decode and resize images while the VAE works; default: one.
        on_items: called with the number of images or prompts after each batch.
    """

    def __init__(
        self,
        pipeline: Any,
        family: ModelFamily,
        preferences: PairSource,
        settings: CacheSettings,
        plan: CachePlan,
        pool: Executor | None = None,
        on_items: Callable[[int], object] | None = None,
    ) -> None:
        self.pipeline, self.family, self.preferences = pipeline, family, preferences
        self.settings, self.plan = settings, plan
        self.pool = pool or ThreadPoolExecutor(1)
        self.on_items = on_items or (lambda count: None)

    def write(self, task: ShardTask) -> None:
        """Encodes and writes one shard.

        Raises:
            ValueError: an image is no longer what was indexed, or an encoding is not finite.
        """
        if task.bucket is None:
            self._write_prompts(task)
        else:
            self._write_latents(task, task.bucket)

    def _write_latents(self, task: ShardTask, position: int) -> None:
        bucket, items, dtype = (
            self.settings.rule.buckets[position],
            self.plan.items[position],
            self.settings.latent_dtype,
        )
        expected = latent_shape(self.family, self.pipeline, bucket)
        rows: list[bytes] = []
        for chunk, images in self._batches(task.items, items, bucket):
            latents = self.family.encode_images(self.pipeline, images)
            if tuple(latents.shape) != (len(images), *expected):
                raise ValueError(
                    f"{self.family.name} encoded {len(images)} images of {bucket} pixels to {tuple(latents.shape)}; "
                    f"expected {(len(images), *expected)}"
                )
            for item, latent in zip(chunk, latents, strict=True):
                rows.append(_stored(latent, dtype, f"latent of image {items.names[item]!r}", "latent_dtype"))
            self.on_items(len(images))
        names = pa.array([items.names[item] for item in task.items], pa.large_string())
        metadata = {"bucket": str(bucket), "dtype": dtype, "shape": "x".join(map(str, expected))}
        write_arrow(task.path, {"name": names, "latents": fixed_column(rows, len(rows[0]))}, metadata)

    def _batches(self, shard: range, items: BucketItems, bucket: Bucket) -> Iterator[tuple[range, list[Image.Image]]]:
        """Batches of resized images, read ahead by the pool; the sides of one pair are read together."""
        chunks = deque(
            shard[start : start + self.settings.batch_size] for start in range(0, len(shard), self.settings.batch_size)
        )
        pending: deque[Any] = deque()
        while chunks or pending:
            while chunks and len(pending) <= _BATCHES_AHEAD:
                chunk = chunks.popleft()
                groups = [list(group) for _, group in groupby(chunk, key=items.rows.__getitem__)]
                pending.append((chunk, [self.pool.submit(self._read, items, group, bucket) for group in groups]))
            chunk, futures = pending.popleft()
            yield chunk, [image for future in futures for image in future.result()]

    def _read(self, items: BucketItems, group: list[int], bucket: Bucket) -> list[Image.Image]:
        row = items.rows[group[0]]
        try:
            preference = self.preferences[row]
            return [fit_image(side_image(preference, items.sides[item]), bucket) for item in group]
        except (ValueError, OSError, SyntaxError) as error:
            raise ValueError(
                f"pair {row} could be read when the dataset was indexed, but not now ({error}); restore the image and "
                "start again, what is encoded is kept"
            ) from error

    def _write_prompts(self, task: ShardTask) -> None:
        parts: list[Conditioning] = []
        step, dtype = self.settings.batch_size, self.settings.embeds_dtype
        for start in range(0, len(task.items), step):
            prompts = [self.plan.prompts[item] for item in task.items[start : start + step]]
            encoded = self.encode_prompts(prompts)
            parts += [encoded[i : i + 1].trimmed().map(lambda tensor: tensor[0]) for i in range(len(prompts))]
            self.on_items(len(prompts))
        prompts = [self.plan.prompts[item] for item in task.items]
        columns = {"prompt": pa.array(prompts, pa.large_string())}
        for name in ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask"):
            tensors = [getattr(part, name) for part in parts]
            if tensors[0] is not None:
                rows = [_embeds(tensor, dtype, prompt) for tensor, prompt in zip(tensors, prompts, strict=True)]
                columns[name] = pa.array(rows, pa.large_binary())
        metadata = {"dtype": dtype, "channels": str(parts[0].prompt_embeds.shape[-1])}
        write_arrow(task.path, columns, metadata)

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts through the pipeline's text encoders, where these are."""
        device = next(part.device for name, part in self.pipeline.components.items() if _is_text_encoder(name, part))
        return self.family.encode_prompts(
            self.pipeline, prompts, max_sequence_length=self.settings.max_sequence_length, device=device
        )


def latent_shape(family: ModelFamily, pipeline: Any, bucket: Bucket) -> tuple[int, ...]:
    """Shape of one latent of a bucket.

    Raises:
        ValueError: the pipeline cannot take this size.
    """
    config = getattr(pipeline, family.denoiser_attribute).config
    try:
        return family.latent_shape(pipeline, bucket.height, bucket.width, config)
    except ValueError as error:
        raise ValueError(f"the bucket {bucket} does not fit the pipeline: {error}") from error


def has_text_encoders(pipeline: Any) -> bool:
    """Whether a pipeline has text encoders with which prompts can be embedded."""
    return any(_is_text_encoder(name, part) for name, part in pipeline.components.items())


def _is_text_encoder(name: str, part: object) -> bool:
    return name.startswith("text_encoder") and isinstance(part, torch.nn.Module)


def _embeds(tensor: Tensor, dtype: str, prompt: str) -> bytes:
    if tensor.dtype == torch.bool:
        return tensor.cpu().numpy().tobytes()
    return _stored(tensor, dtype, f"embedding of prompt {prompt!r}", "embeds_dtype")


def _stored(tensor: Tensor, dtype: str, what: str, option: str) -> bytes:
    try:
        return tensor_bytes(tensor, dtype)
    except ValueError as error:
        raise ValueError(f"the {what} cannot be stored: {error} ({option})") from error
