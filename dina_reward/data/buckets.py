"""Aspect-ratio buckets: the image sizes that latents are cached in, and how an image gets one of them.

The published buckets (arXiv 2602.11146) are `PUBLISHED_BUCKETS`. With ``aspect = width / height``:

1. *Accept.* An image accepts a bucket when ``|log(aspect of the image / aspect of the bucket)| <= tolerance`` (0.03) and
   covering the bucket scales the image by at most ``max_upscale``.
2. *Share.* Both images of a pair go into one bucket, one that both accept. A pair without one is left out and counted.
3. *Choose.* Of several such buckets the one with the most pixels is taken; of equally large ones the one whose aspect
   is closer to both images (smaller sum of the two log differences), then the first in the list.
   So two images of 1024 x 1024 use 1024 x 1024, while 1024 x 1024 against 512 x 512 is compared at 512 x 512.
4. *Resize.* The image is scaled by ``max(bucket width / width, bucket height / height)``, so that it just covers the
   bucket, and the middle is cut out; at most ``1 - e^-tolerance`` (3 %) of one side is lost. Filter: Lanczos.

``max_upscale`` is 1.05 by default: images are never enlarged, except by what the aspect tolerance itself costs
(``e^0.03 = 1.031``), without which an image of 1216 x 832 could not use 1248 x 832.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, order=True)
class Bucket:
    """An image size in pixels.

    Examples:
        >>> Bucket.parse("1248x832")
        Bucket(width=1248, height=832)
    """

    width: int
    height: int

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a bucket needs a positive width and height, got {self.width} x {self.height}")

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def pixels(self) -> int:
        """Area in pixels."""
        return self.width * self.height

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """Reads ``WIDTHxHEIGHT``, or ``SIDE`` for a square.

        Raises:
            ValueError: anything else.
        """
        match = re.fullmatch(r"\s*(\d+)\s*(?:[xX]\s*(\d+))?\s*", text)
        if match is None:
            raise ValueError(f"a bucket is written WIDTHxHEIGHT or SIDE, in pixels, e.g. 1248x832; got {text!r}")
        width = int(match[1])
        return cls(width, int(match[2] or width))


PUBLISHED_BUCKETS = tuple(
    Bucket.parse(size)
    for size in (
        *("256x256", "512x512", "1024x1024", "1248x832", "1344x896", "832x1248", "896x1344"),
        *("1024x768", "768x1024", "1472x832", "832x1472", "1152x832", "832x1152"),
    )
)
"""Buckets of the published recipe, as width x height."""


@dataclass(frozen=True)
class BucketRule:
    """Which bucket the images of a pair share; the rule is at the top of this module.

    Args:
        buckets: allowed sizes, all different.
        tolerance: largest accepted ``|log aspect difference|``.
        max_upscale: largest accepted enlargement of an image.
    """

    buckets: tuple[Bucket, ...] = PUBLISHED_BUCKETS
    tolerance: float = 0.03
    max_upscale: float = 1.05

    def __post_init__(self) -> None:
        if not self.buckets or len(set(self.buckets)) != len(self.buckets):
            raise ValueError(f"buckets must be different sizes and at least one, got {[str(b) for b in self.buckets]}")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance must be finite and not negative, got {self.tolerance}")
        if not (math.isfinite(self.max_upscale) and self.max_upscale > 0):
            raise ValueError(f"max_upscale must be finite and positive, got {self.max_upscale}")

    @classmethod
    def of(cls, sizes: Iterable[str], *, tolerance: float = 0.03, max_upscale: float = 1.05) -> BucketRule:
        """A rule over buckets written as text; without any, over the published ones."""
        buckets = tuple(Bucket.parse(size) for size in sizes)
        return cls(buckets or PUBLISHED_BUCKETS, tolerance, max_upscale)

    def difference(self, size: tuple[int, int], bucket: Bucket) -> float:
        """``|log aspect difference|`` between an image of ``size`` (width, height) and a bucket."""
        return abs(math.log(size[0] * bucket.height / (size[1] * bucket.width)))

    def accepts(self, size: tuple[int, int], bucket: Bucket) -> bool:
        """Whether an image of ``size`` (width, height) may go into the bucket."""
        # A hair of slack, so that equal ratios are equal whatever order they are computed in.
        return (
            self.difference(size, bucket) <= self.tolerance + 1e-9
            and cover_scale(size, bucket) <= self.max_upscale + 1e-9
        )

    def choose(self, *sizes: tuple[int, int]) -> int | None:
        """Position in ``buckets`` of the one that images of these sizes (width, height) share; ``None``: there is none.

        Raises:
            ValueError: no size given, or one that is not positive.
        """
        if not sizes or any(side < 1 for size in sizes for side in size):
            raise ValueError(f"expected sizes as (width, height) in pixels, got {sizes}")
        ranked = [
            (-bucket.pixels, round(sum(self.difference(size, bucket) for size in sizes), 9), position)
            for position, bucket in enumerate(self.buckets)
            if all(self.accepts(size, bucket) for size in sizes)
        ]
        return min(ranked)[2] if ranked else None


def cover_scale(size: tuple[int, int], bucket: Bucket) -> float:
    """Factor by which an image of ``size`` (width, height) is scaled to cover a bucket; above 1 it is enlarged."""
    return max(bucket.width / size[0], bucket.height / size[1])


def fit_image(image: Image.Image, bucket: Bucket) -> Image.Image:
    """The image in RGB, scaled to cover the bucket and cut to its middle; pixel for pixel itself where it fits already.

    Scaling and cutting are one resampling, of the largest centred rectangle with the bucket's aspect.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.size == (bucket.width, bucket.height):
        return image
    scale = cover_scale(image.size, bucket)
    width, height = bucket.width / scale, bucket.height / scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (max(left, 0.0), max(top, 0.0), min(left + width, image.width), min(top + height, image.height))
    return image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
