"""The index of a latent cache: what the pairs say and how large their images are, and the plan that follows from it.

Indexing decodes every image once, so that broken images are known, counted and left out before anything is encoded.
"""

from __future__ import annotations

import zlib
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from dina_reward.data.arrow_files import numbers, open_arrow, write_arrow
from dina_reward.data.broken import BrokenRowError, BrokenRows
from dina_reward.data.buckets import BucketRule
from dina_reward.data.preference import Preference


class PairSource(Protocol):
    """A map-style dataset of `Preference`: a `dina_reward.data.PreferenceReader`, a list, ..."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Preference: ...


INDEX_FOLDER = "index"
_LOADING = Lock()
_TEXTS = ("prompt", "source", "group", "a_name", "b_name", "broken")
_NUMBERS = {
    "p_a": pa.float64(), "weight": pa.float64(),
    "a_width": pa.int32(), "a_height": pa.int32(), "b_width": pa.int32(), "b_height": pa.int32(),
    "a_content": pa.int64(), "b_content": pa.int64(),
}  # fmt: skip


def shard_ranges(count: int, size: int) -> list[range]:
    """Consecutive ranges of ``size`` work items, the last one shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def shard_name(number: int) -> str:
    """File name of a shard; it depends on nothing but the shard's number."""
    return f"{number:06d}.arrow"


def side_image(preference: Preference, side: int) -> Image.Image:
    """Image ``a`` (0) or ``b`` (1) of a pair, decoded.

    Raises:
        ValueError: the side is a latent or a video.
        OSError: the image cannot be decoded.
    """
    image = (preference.a, preference.b)[side]
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"the cache encodes images, but side {'ab'[side]} of the pair with prompt {preference.prompt!r} is a "
            f"{type(image).__name__}; latents need no cache, and videos are not supported"
        )
    # Pairs may share an image, and Pillow does not load one from several threads. Those of readers are loaded already.
    with _LOADING:
        image.load()
    return image


def describe_pair(preferences: PairSource, row: int) -> dict[str, Any]:
    """One row of the index; ``broken`` is the reason why the pair cannot be used, or empty."""
    entry: dict[str, Any] = {**dict.fromkeys(_TEXTS, ""), **dict.fromkeys(_NUMBERS, 0)}
    try:
        preference = preferences[row]
        images = [side_image(preference, side) for side in (0, 1)]
        sizes, contents = [image.size for image in images], [zlib.crc32(image.tobytes()) for image in images]
    except (BrokenRowError, OSError, SyntaxError) as error:
        return {**entry, "broken": str(error) or type(error).__name__}
    for name in ("prompt", "source", "group", "p_a", "weight"):
        entry[name] = getattr(preference, name)
    for side, size, content in zip("ab", sizes, contents, strict=True):
        entry[f"{side}_name"] = getattr(preference, f"{side}_name") or f"pair {row}, side {side}"
        entry[f"{side}_width"], entry[f"{side}_height"] = size
        entry[f"{side}_content"] = content
    return entry


def write_index_shard(path: Path, preferences: PairSource, rows: range, pool: Executor) -> list[tuple[int, str]]:
    """Indexes a range of pairs; returns row and reason of those that are broken."""
    entries = list(pool.map(lambda row: describe_pair(preferences, row), rows))
    columns = {name: pa.array([entry[name] for entry in entries], pa.large_string()) for name in _TEXTS}
    for name, kind in _NUMBERS.items():
        columns[name] = pa.array([entry[name] for entry in entries], kind)
    write_arrow(path, columns)
    return [(row, entry["broken"]) for row, entry in zip(rows, entries, strict=True) if entry["broken"]]


@dataclass
class BucketItems:
    """Images to encode in one bucket, in order of their first occurrence.

    Args:
        names: name of each image.
        rows, sides: pair and side (0 is ``a``) where it occurs first.
    """

    names: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class CachePlan:
    """What a cache will hold; a function of the index and the bucket rule.

    Args:
        items: images to encode, for each bucket of the rule.
        prompts: different prompts of the kept pairs, in order of their first occurrence.
        kept: rows of the dataset that the cache holds, shape ``(kept,)``.
        bucket: position of each kept pair's bucket in the rule, shape ``(kept,)``.
        chosen, rejected: position of its images among their bucket's items, shape ``(kept,)``.
        prompt: position of its prompt in ``prompts``, shape ``(kept,)``.
        broken: pairs left out because an image or the row is unusable.
        without_bucket: pairs left out because their images share no bucket.
        first_without_bucket: row and the two sizes of the first of them.
    """

    items: list[BucketItems]
    prompts: list[str]
    kept: np.ndarray
    bucket: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    prompt: np.ndarray
    broken: BrokenRows
    without_bucket: int
    first_without_bucket: list[str]

    @property
    def images(self) -> int:
        """Encodings that the cache holds: different images, counted once for each bucket they are used in."""
        return sum(map(len, self.items))


class PairIndex:
    """All index shards of a cache, read together.

    Args:
        directory: the cache.
        shards: number of index shards.
    """

    def __init__(self, directory: Path, shards: int) -> None:
        batches = [open_arrow(directory / INDEX_FOLDER / shard_name(number)) for number in range(shards)]
        self.table = pa.Table.from_batches(batches).combine_chunks()

    def __len__(self) -> int:
        return self.table.num_rows

    def texts(self, name: str) -> list[str]:
        """A text column."""
        return self.table.column(name).to_pylist()

    def take(self, name: str, rows: np.ndarray) -> pa.Array:
        """Some rows of a column, as one array."""
        taken = self.table.column(name).take(pa.array(rows))
        return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken

    def sizes(self, side: str) -> list[tuple[int, int]]:
        """Width and height of the images ``a`` or ``b``."""
        batch = self.table.to_batches()[0]
        return list(
            zip(numbers(batch, f"{side}_width").tolist(), numbers(batch, f"{side}_height").tolist(), strict=True)
        )

    def contents(self, side: str) -> list[int]:
        """Checksums of the images ``a`` or ``b``; zeros in caches of versions that kept none."""
        name = f"{side}_content"
        return self.table.column(name).to_pylist() if name in self.table.column_names else [0] * len(self)


def make_plan(index: PairIndex, rule: BucketRule, max_broken: float) -> CachePlan:
    """Decides for every pair whether it is kept, in which bucket, and where its images and its prompt will be.

    Raises:
        ValueError: more than ``max_broken`` of the pairs are broken, or no pair is left.
    """
    planner = _Planner(index, rule, max_broken)
    for row in range(len(index)):
        planner.add(row)
    return planner.plan()


class _Planner:
    def __init__(self, index: PairIndex, rule: BucketRule, max_broken: float) -> None:
        self.rule = rule
        self.choose = lru_cache(maxsize=None)(rule.choose)
        self.reasons, self.texts = index.texts("broken"), index.texts("prompt")
        self.names = (index.texts("a_name"), index.texts("b_name"))
        self.sizes = (index.sizes("a"), index.sizes("b"))
        self.contents = (index.contents("a"), index.contents("b"))
        self.broken = BrokenRows(len(index), max_broken)
        self.known: dict[str, tuple[tuple[int, int], int]] = {}
        self.items = [BucketItems() for _ in rule.buckets]
        self.places: list[dict[str, int]] = [{} for _ in rule.buckets]
        self.prompts: dict[str, int] = {}
        self.rows: list[tuple[int, int, int, int, int]] = []
        self.homeless: list[int] = []

    def add(self, row: int) -> None:
        reason = self.reasons[row] or self._name_clash(row)
        if reason:
            self.broken.add(row, reason)
            return
        bucket = self.choose(self.sizes[0][row], self.sizes[1][row])
        if bucket is None:
            self.homeless.append(row)
            return
        chosen, rejected = (self._place(bucket, row, side) for side in (0, 1))
        prompt = self.prompts.setdefault(self.texts[row], len(self.prompts))
        self.rows.append((row, bucket, chosen, rejected, prompt))

    def _name_clash(self, row: int) -> str:
        for names, sizes, contents in zip(self.names, self.sizes, self.contents, strict=True):
            name, size = names[row], sizes[row]
            known, content = self.known.setdefault(name, (size, contents[row]))
            if known != size:
                return (
                    f"two images with one name: {name!r} is {size[0]} x {size[1]} here, {known[0]} x {known[1]} before"
                )
            if content != contents[row]:
                return f"two images with one name: {name!r} is another picture here than before"
        return ""

    def _place(self, bucket: int, row: int, side: int) -> int:
        name, items, places = self.names[side][row], self.items[bucket], self.places[bucket]
        place = places.setdefault(name, len(items))
        if place == len(items):
            items.names.append(name)
            items.rows.append(row)
            items.sides.append(side)
        return place

    def plan(self) -> CachePlan:
        if not self.rows:
            example = self._describe(self.homeless[0]) if self.homeless else "every row is broken"
            raise ValueError(
                f"none of the {len(self.texts)} pairs can be cached ({example}); choose buckets that fit the images, a "
                "larger max_upscale or a larger tolerance"
            )
        kept, bucket, chosen, rejected, prompt = np.array(self.rows, np.int64).T
        first = [self._describe(row) for row in self.homeless[:10]]
        return CachePlan(
            self.items, list(self.prompts), kept, bucket.astype(np.int16), chosen, rejected, prompt,
            self.broken, len(self.homeless), first,
        )  # fmt: skip

    def _describe(self, row: int) -> str:
        (a, b), (c, d) = self.sizes[0][row], self.sizes[1][row]
        return f"pair {row}: {a} x {b} and {c} x {d} share no bucket"
