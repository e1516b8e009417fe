"""A small dataset of rendered images of the embedded world, as a reader sees it, and its buckets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dina_reward.data import Preference
from dina_reward.data.broken import BrokenRowError
from dina_reward.data.buckets import BucketRule
from dina_reward.data.cache_manifest import CacheSettings
from dina_reward.shapes import render, sample_prompts


RULE = BucketRule.of(("32x32", "48x32", "16x16"))
SETTINGS = CacheSettings(RULE, batch_size=3, images_per_shard=8, prompts_per_shard=4, pairs_per_shard=10)
SIZES = ((32, 32), (48, 32), (64, 64), (16, 16))


class ImagePairs(Sequence[Preference]):
    """Pairs of images of a folder; ``broken`` rows cannot be read. Picklable.

    Pair ``i`` compares image ``i`` with image ``i + 4``, so that inner images occur in two pairs and both sides have one
    size, except where ``i % 10 == 9``: there the sizes share no bucket.
    """

    def __init__(self, folder: Path, pairs: int, broken: Sequence[int] = ()) -> None:
        self.folder, self.pairs, self.broken = folder, pairs, set(broken)
        self.prompts = sample_prompts(pairs, "train", seed=0)

    def __len__(self) -> int:
        return self.pairs

    def __getitem__(self, row: Any) -> Preference:
        if row in self.broken:
            raise BrokenRowError(row, "the image cannot be read")
        names = (f"{row}.png", f"{row + 1 if row % 10 == 9 else row + 4}.png")
        a, b = (Image.open(self.folder / name).convert("RGB") for name in names)
        return Preference(
            self.prompts[row % 7], a, b, p_a=(row % 5) / 4, weight=1 + row % 2, source="shapes", group=str(row % 7),
            a_name=names[0], b_name=names[1],
        )  # fmt: skip


def write_images(folder: Path, count: int) -> None:
    """Renders ``count`` images; image ``i`` has the size ``SIZES[i % 4]``."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = render(sample_prompts(count, "train", seed=1), torch.Generator().manual_seed(1))
    for number, image in enumerate((255 * pixels).round().byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).resize(SIZES[number % 4]).save(folder / f"{number}.png")


def make_pairs(folder: Path, pairs: int, broken: Sequence[int] = ()) -> ImagePairs:
    """A dataset of ``pairs`` pairs in ``folder``, written if need be."""
    if not folder.exists():
        write_images(folder, pairs + 4)
    return ImagePairs(folder, pairs, broken)


def shard_bytes(directory: Path) -> dict[str, bytes]:
    """Content of every Arrow file of a cache by its relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*.arrow"))}
