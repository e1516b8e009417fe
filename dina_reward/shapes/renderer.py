"""Scenes to 32x32 images, and the degradations that make bad images out of good ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prompts import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, as_scene


IMAGE_SIZE = 32
MAX_OFFSET = 3.0
"""Largest distance of a shape's centre from the image's centre, per axis, in pixels."""

RADIUS_RANGES = {"small": (5.5, 7.0), "large": (9.5, 11.0)}
"""Half the extent of a shape, in pixels, for each size class."""

PALETTE = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.12, 0.65, 0.25),
    "blue": (0.12, 0.32, 0.90),
    "purple": (0.60, 0.15, 0.75),
    "white": (1.0, 1.0, 1.0),
    "gray": (0.5, 0.5, 0.5),
    "black": (0.0, 0.0, 0.0),
}


@dataclass(frozen=True)
class Placement:
    """Where the shapes of a batch lie.

    Args:
        center (Tensor): centre (x, y) relative to the image's centre in pixels, shape (batch_size, 2).
        radius (Tensor): half the extent in pixels, shape (batch_size,).
    """

    center: Tensor
    radius: Tensor


def palette(names: Sequence[str]) -> Tensor:
    """The RGB colors called `names`, shape (len(names), 3), values in [0, 1]."""
    return torch.tensor([PALETTE[name] for name in names])


def sample_placement(scenes: Sequence[Scene], generator: torch.Generator, jitter: float = 1.0) -> Placement:
    """Draw a random centre for each scene and a random radius within its size class.

    Args:
        scenes (Sequence[Scene]): what is placed.
        generator (torch.Generator): makes the draws.
        jitter (float): share of the ranges that is used, 1 for all, 0 for always the middle.
    """
    if not 0 <= jitter <= 1:
        raise ValueError(f"jitter is {jitter}; expected a value from 0 (no randomness) to 1 (the whole range).")
    low, high = torch.tensor([RADIUS_RANGES[scene.size] for scene in scenes]).reshape(-1, 2).unbind(1)
    draws = jitter * (torch.rand(len(scenes), 3, generator=generator) - 0.5)
    radius = (low + high) / 2 + (high - low) * draws[:, 2]
    return Placement(center=2 * MAX_OFFSET * draws[:, :2], radius=radius)


def coverage(shape: Tensor, placement: Placement) -> Tensor:
    """Share of every pixel that a shape covers, from the signed distance to its outline.

    coverage = clamp(1/2 - distance, 0, 1), which antialiases the outline over about one pixel.

    Args:
        shape (Tensor): index into `SHAPES`, shape (batch_size,).
        placement (Placement): centres and radii of the batch.

    Returns:
        Tensor: coverage in [0, 1], shape (batch_size, 32, 32).
    """
    axis = torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
    x = axis[None, None, :] - placement.center[:, 0, None, None]
    y = axis[None, :, None] - placement.center[:, 1, None, None]
    radius = placement.radius[:, None, None]
    distance = torch.empty(len(shape), IMAGE_SIZE, IMAGE_SIZE)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        distance[rows] = _DISTANCES[name](x[rows], y[rows], radius[rows])
    return (0.5 - distance).clamp(0, 1)


def compose(foreground: Tensor, background: Tensor, cover: Tensor) -> Tensor:
    """Paint `foreground` over `background` (both (batch_size, 3)) where `cover` is one: (batch_size, 3, 32, 32)."""
    return torch.lerp(background[:, :, None, None], foreground[:, :, None, None], cover[:, None])


def render(
    scenes: Sequence[Scene | str],
    generator: torch.Generator | None = None,
    placement: Placement | None = None,
    jitter: float = 1.0,
) -> Tensor:
    """Draw scenes (or captions) as RGB images.

    Args:
        scenes (Sequence[Scene | str]): what to draw.
        generator (torch.Generator, optional): where the random placements come from.
        placement (Placement, optional): explicit placements instead of random ones.
        jitter (float): how widely random placements spread, see `sample_placement`.

    Returns:
        Tensor: images in [0, 1], shape (len(scenes), 3, 32, 32).
    """
    parsed = [as_scene(scene) for scene in scenes]
    if placement is None:
        if generator is None:
            raise ValueError("render() got neither a generator nor a placement; pass one of the two.")
        placement = sample_placement(parsed, generator, jitter)
    shape = torch.tensor([SHAPES.index(scene.shape) for scene in parsed], dtype=torch.long)
    cover = coverage(shape, placement)
    foreground = palette([scene.color for scene in parsed])
    return compose(foreground, palette([scene.background for scene in parsed]), cover)


def _circle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.hypot(x, y) - radius


def _square(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.9 * radius


def _triangle(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    slope = 2 / 5**0.5  # Normal of a side that falls by 2 for each step of 1 outwards.
    return torch.maximum(y - radius, slope * (x.abs() - (y + radius) / 2))


def _cross(x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    x, y, arm = x.abs(), y.abs(), radius / 3
    return torch.minimum(torch.maximum(x - radius, y - arm), torch.maximum(x - arm, y - radius))


_DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}
assert tuple(_DISTANCES) == SHAPES
assert tuple(RADIUS_RANGES) == SIZES
assert set(PALETTE) == {*COLORS, *BACKGROUNDS}
