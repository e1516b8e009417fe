"""Latent cache: a preference dataset of images, encoded once, as files that training reads at random.

A cache is made in three stages, each of them in shards, i.e. files that appear whole or not at all:

| file | content |
|---|---|
| ``manifest.json`` | fingerprints of pipeline and dataset, settings, and in the end the report |
| ``index/NNNNNN.arrow`` | text, labels and image sizes of a range of pairs |
| ``latents/WIDTHxHEIGHT/NNNNNN.arrow`` | latents of a range of the different images of one bucket |
| ``prompts/NNNNNN.arrow`` | optional: embeddings of a range of the different prompts, without padding |
| ``pairs.arrow`` | the kept pairs: text, labels, and where their latents are |

Which work items a shard holds, and which of them are encoded together, follows from dataset and settings alone. So a run
that was killed continues with the missing shards, any number of processes may share the work, and on equal hardware and
libraries the files are the same to the byte. Every different image (by name) is encoded once for each bucket it is used
in, which is more than one only where it is compared with images of different sizes.

Arrow IPC files rather than parquet, see `dina_reward.data.arrow_files`. A bucket has files of its own, so that all
latents of a file have one size.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from tqdm.auto import tqdm

from dina_reward.checkpoints.locking import sole_owner
from dina_reward.data.arrow_files import STORED_DTYPES, write_arrow
from dina_reward.data.broken import BrokenRows
from dina_reward.data.cache_encode import ShardEncoder, has_text_encoders, latent_shape, shard_tasks
from dina_reward.data.cache_index import (
    INDEX_FOLDER,
    CachePlan,
    PairIndex,
    PairSource,
    make_plan,
    shard_name,
    shard_ranges,
    write_index_shard,
)
from dina_reward.data.cache_manifest import (
    MANIFEST_NAME,
    CacheSettings,
    begin_manifest,
    dataset_fingerprint,
    is_cache,
    pipeline_fingerprint,
    read_manifest,
    write_manifest,
)
from dina_reward.families import family_of


PAIRS_NAME = "pairs.arrow"


@dataclass(frozen=True)
class CacheReport:
    """What a cache holds, or will hold.

    Args:
        dataset_pairs: pairs of the dataset.
        pairs: pairs in the cache.
        broken: pairs left out because the row or an image is unusable.
        without_bucket: pairs left out because their images share no bucket.
        images: latents, i.e. different images, once for each bucket they are used in.
        prompts: different prompts with stored embeddings; 0 when none are stored.
        shards: files with latents or embeddings.
        bytes: their size, of embeddings an upper bound from the longest prompt.
        free_bytes: space that was left on the disk.
        images_per_bucket: latents of each bucket in use.
        first_left_out: reasons of the first pairs that were left out.
    """

    dataset_pairs: int
    pairs: int
    broken: int
    without_bucket: int
    images: int
    prompts: int
    shards: int
    bytes: int
    free_bytes: int
    images_per_bucket: dict[str, int]
    first_left_out: list[str]

    def __str__(self) -> str:
        buckets = ", ".join(f"{name}: {count:,}" for name, count in self.images_per_bucket.items())
        prompts = f", {self.prompts:,} prompts" if self.prompts else ""
        lines = [
            f"{self.pairs:,} of {self.dataset_pairs:,} pairs; {self.images:,} different images{prompts}; "
            f"{_size(self.bytes)} in {self.shards:,} shards ({_size(self.free_bytes)} free)",
            f"images per bucket: {buckets}",
        ]
        if self.broken or self.without_bucket:
            lines.append(f"left out: {self.broken:,} broken pairs, {self.without_bucket:,} without a common bucket")
            lines += [f"  {reason}" for reason in self.first_left_out]
        return "\n".join(lines)


def build_cache(
    preferences: PairSource,
    pipeline: Any,
    directory: str | os.PathLike[str],
    settings: CacheSettings | None = None,
    *,
    max_broken: float = 0.01,
    workers: int = 4,
    dry_run: bool = False,
    on_report: Callable[[CacheReport], object] | None = None,
    progress: bool = True,
) -> CacheReport:
    """Encodes a dataset, or finishes what an interrupted call has begun; several processes share the work.

    Examples:
        >>> build_cache(read_preferences("pairs.json"), pipeline, "cache")
        >>> rows = CachedPreferences("cache")

    Args:
        preferences: pairs of images, by `dina_reward.data.read_preferences` or any sequence of `Preference`.
        pipeline: diffusers pipeline with its VAE, and for prompt embeddings its text encoders, on their device.
        directory: where to write; with several processes one that all of them see.
        settings: buckets, dtypes, sizes of shards.
        max_broken: share of pairs that may be unusable.
        workers: threads of each process that decode and resize images.
        dry_run: index and plan only.
        on_report: called in the main process before encoding starts, with what the cache will hold.
        progress: show progress bars in the main process.

    Returns:
        What the cache holds.

    Raises:
        ValueError: the directory holds a cache of something else, or another run is writing into it; a bucket does not fit
            the pipeline, too many pairs are broken, or an encoding is not finite. What is broken stays left out when the
            call is repeated; after a repair of the dataset, start in an empty directory.
    """
    run = _Run(preferences, pipeline, Path(directory), settings or CacheSettings(), max_broken, progress)
    with run.alone(), ThreadPoolExecutor(max(1, workers)) as pool:
        manifest = run.begin()
        index = run.index(pool)
        plan = make_plan(index, run.settings.rule, max_broken)
        report = run.report(plan)
        if run.is_main and on_report is not None:
            on_report(report)
        if dry_run:
            return report
        run.encode(plan, pool)
        if run.is_main and not manifest["complete"]:
            _write_pairs(run.directory / PAIRS_NAME, index, plan)
            held = {name: value for name, value in asdict(report).items() if name != "free_bytes"}
            finished = {**manifest, "complete": True, "latent_shapes": run.latent_shapes(), "report": held}
            write_manifest(run.directory / MANIFEST_NAME, finished)
        run.state.wait_for_everyone()
    return report


class _Run:
    """The stages of `build_cache`, with its arguments."""

    def __init__(
        self,
        preferences: PairSource,
        pipeline: Any,
        directory: Path,
        settings: CacheSettings,
        max_broken: float,
        progress: bool,
    ) -> None:
        self.state, self.family = processes(), family_of(pipeline)
        self.preferences, self.pipeline, self.directory = preferences, pipeline, directory
        self.settings, self.max_broken = settings, max_broken
        self.is_main = bool(self.state.is_main_process)
        self.show = progress and self.is_main

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Inside the context no other run writes into the directory; a cache that is complete is only read."""
        nothing_to_write = is_cache(self.directory) and read_manifest(self.directory).get("complete")
        return sole_owner(self.directory) if self.is_main and not nothing_to_write else contextlib.nullcontext()

    def begin(self) -> dict[str, Any]:
        """Checks everything that can be checked before the first image is read; returns the manifest."""
        if len(self.preferences) == 0:
            raise ValueError("the dataset has no pairs")
        if getattr(self.pipeline, "vae", None) is None:
            raise ValueError(
                f"the {type(self.pipeline).__name__} was loaded without its VAE, which encodes the images"
            )
        if self.settings.prompt_embeds and not has_text_encoders(self.pipeline):
            raise ValueError(f"prompt_embeds needs the text encoders, but the {type(self.pipeline).__name__} has none")
        self.latent_shapes()
        content = {
            "pipeline": pipeline_fingerprint(self.pipeline, self.family, self.settings.prompt_embeds),
            "dataset": dataset_fingerprint(self.preferences),
            "settings": self.settings.to_json(),
        }
        with self.state.main_process_first():
            return begin_manifest(self.directory / MANIFEST_NAME, content)

    def latent_shapes(self) -> dict[str, list[int]]:
        """Shape of a latent of every bucket, without batch dimension."""
        buckets = self.settings.rule.buckets
        return {str(bucket): list(latent_shape(self.family, self.pipeline, bucket)) for bucket in buckets}

    def index(self, pool: Executor) -> PairIndex:
        """Writes the missing index shards of this process, waits for the others and reads all."""
        shards = list(enumerate(shard_ranges(len(self.preferences), self.settings.pairs_per_shard)))
        mine = shards[self.state.process_index :: self.state.num_processes]
        broken = BrokenRows(len(self.preferences), self.max_broken)
        with self._bar("indexing", "pair", sum(len(rows) for _, rows in mine)) as bar:
            for number, rows in mine:
                path = self.directory / INDEX_FOLDER / shard_name(number)
                if not path.exists():
                    for row, reason in write_index_shard(path, self.preferences, rows, pool):
                        broken.add(row, reason)
                bar.update(len(rows))
        self.state.wait_for_everyone()
        return PairIndex(self.directory, len(shards))

    def report(self, plan: CachePlan) -> CacheReport:
        """What the plan comes to."""
        width = STORED_DTYPES[self.settings.latent_dtype].itemsize
        used = [(bucket, len(items)) for bucket, items in zip(self.settings.rule.buckets, plan.items, strict=True)]
        shapes = self.latent_shapes()
        size = sum(count * width * math.prod(shapes[str(bucket)]) for bucket, count in used)
        embedded = plan.prompts if self.settings.prompt_embeds else []
        if embedded:
            longest = self._encoder(plan).encode_prompts([max(embedded, key=len)]).trimmed()
            numbers = longest.prompt_embeds.numel()
            numbers += 0 if longest.pooled_prompt_embeds is None else longest.pooled_prompt_embeds.numel()
            size += len(embedded) * STORED_DTYPES[self.settings.embeds_dtype].itemsize * numbers
        broken = [f"pair {row}: {reason}" for row, reason in plan.broken.first]
        return CacheReport(
            dataset_pairs=len(self.preferences),
            pairs=len(plan.kept),
            broken=plan.broken.count,
            without_bucket=plan.without_bucket,
            images=plan.images,
            prompts=len(embedded),
            shards=len(shard_tasks(self.directory, plan, self.settings)),
            bytes=size,
            free_bytes=shutil.disk_usage(self.directory).free,
            images_per_bucket={str(bucket): count for bucket, count in used if count},
            first_left_out=broken + plan.first_without_bucket,
        )

    def encode(self, plan: CachePlan, pool: Executor) -> None:
        """Writes the missing shards of this process and waits for the others."""
        tasks = shard_tasks(self.directory, plan, self.settings)
        mine = tasks[self.state.process_index :: self.state.num_processes]
        with self._bar("encoding", "item", sum(len(task.items) for task in mine)) as bar:
            encoder = self._encoder(plan, pool, bar.update)
            for task in mine:
                if task.path.exists():
                    bar.update(len(task.items))
                else:
                    encoder.write(task)
        self.state.wait_for_everyone()

    def _encoder(self, plan: CachePlan, pool: Executor | None = None, on_items: Any = None) -> ShardEncoder:
        return ShardEncoder(self.pipeline, self.family, self.preferences, self.settings, plan, pool, on_items)

    def _bar(self, what: str, unit: str, total: int) -> Any:
        share = f" (1 of {self.state.num_processes} processes)" if self.state.num_processes > 1 else ""
        return tqdm(desc=what + share, unit=unit, total=total, disable=not self.show)


def processes() -> Any:
    """The processes that share the work; those that finish first wait for the others as long as it takes.

    Raises:
        ValueError: processes were launched but do not know of each other.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate knows of {state.num_processes}; on CPUs set "
            "ACCELERATE_USE_CPU=true"
        )
    return state


def _write_pairs(path: Path, index: PairIndex, plan: CachePlan) -> None:
    columns = {name: index.take(name, plan.kept) for name in ("prompt", "source", "group")}
    columns["p_chosen"], columns["weight"] = index.take("p_a", plan.kept), index.take("weight", plan.kept)
    for name, values in (
        ("bucket", plan.bucket), ("chosen", plan.chosen), ("rejected", plan.rejected),
        ("prompt_item", plan.prompt), ("row", plan.kept),
    ):  # fmt: skip
        columns[name] = pa.array(values)
    write_arrow(path, columns)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
