"""Ways to spoil an image, each with a strength from 0 (leaves it alone) to 1 (nearly ruins it)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .prompts import COLORS, SHAPES, Scene
from .renderer import IMAGE_SIZE, coverage, palette, sample_placement


MAX_BLUR = 3.0
"""Standard deviation of the strongest blur, in pixels."""

MAX_NOISE = 0.35
"""Standard deviation of the strongest pixel noise."""


def blur(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian blur of standard deviation 3 * strength pixels."""
    offsets = torch.arange(-8.0, 9.0)
    sigma = (MAX_BLUR * strength).clamp(min=1e-2)[:, None]
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=1).repeat_interleave(3, dim=0)
    flat = images.reshape(1, -1, IMAGE_SIZE, IMAGE_SIZE)
    flat = F.conv2d(F.pad(flat, (8, 8, 0, 0), "replicate"), kernel[:, None, None, :], groups=flat.shape[1])
    flat = F.conv2d(F.pad(flat, (0, 0, 8, 8), "replicate"), kernel[:, None, :, None], groups=flat.shape[1])
    return flat.reshape(images.shape)


def noise(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """White noise of standard deviation 0.35 * strength in every pixel and channel."""
    return images + MAX_NOISE * _per_image(strength) * torch.randn(images.shape, generator=generator)


def washout(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Pull all colors towards the image's mean color, by 0.7 * strength of the way."""
    return torch.lerp(images, images.mean(dim=(2, 3), keepdim=True), 0.7 * _per_image(strength))


def tint(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Blend the whole image with one random color, by 0.5 * strength."""
    color = torch.rand(len(images), 3, 1, 1, generator=generator)
    return torch.lerp(images, color.expand_as(images), 0.5 * _per_image(strength))


def clutter(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Paint three small blobs of random colors, with opacity growing with strength."""
    for _ in range(3):
        count = len(images)
        color = palette(COLORS)[torch.randint(len(COLORS), (count,), generator=generator)]
        center = (torch.rand(count, 2, generator=generator) - 0.5) * IMAGE_SIZE
        radius = 1.0 + 3.0 * torch.rand(count, generator=generator) * strength
        images = _paint(images, _disc(center, radius) * strength.clamp(max=1)[:, None, None], color)
    return images


def occlusion(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Cover a disc of radius 10 * strength pixels, near the centre, with a random color."""
    count = len(images)
    center = (torch.rand(count, 2, generator=generator) - 0.5) * 2 * 8
    color = torch.rand(count, 3, generator=generator)
    return _paint(images, _disc(center, 10 * strength) * (strength > 0)[:, None, None], color)


def ghost(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Add a second, half transparent shape of random color, kind and place."""
    count = len(images)
    sizes = torch.randint(2, (count,), generator=generator)
    scenes = [Scene(("small", "large")[size], "red", "circle", "white") for size in sizes.tolist()]
    shape = torch.randint(len(SHAPES), (count,), generator=generator)
    cover = coverage(shape, sample_placement(scenes, generator))
    color = palette(COLORS)[torch.randint(len(COLORS), (count,), generator=generator)]
    return _paint(images, cover * (0.8 * strength)[:, None, None], color)


def dots(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Paint a regular grid of small dots of one random color, with opacity growing with strength."""
    count, axis = len(images), torch.arange(IMAGE_SIZE)
    period = torch.randint(4, 9, (count, 1), generator=generator)
    phase = torch.randint(8, (count, 2, 1), generator=generator)
    x, y = ((axis + phase[:, side]) % period < 2 for side in (0, 1))
    color = palette(COLORS)[torch.randint(len(COLORS), (count,), generator=generator)]
    return _paint(images, (x[:, None, :] & y[:, :, None]) * strength[:, None, None], color)


def grid(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Add a standing wave of period 3 to 8 pixels and a random color, of amplitude 0.35 * strength."""
    count, axis = len(images), torch.arange(IMAGE_SIZE)
    period = 3 + 5 * torch.rand(count, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(count, 2, 1, generator=generator)
    x, y = (torch.sin(2 * math.pi * axis / period + phase[:, side]) for side in (0, 1))
    color = 2 * torch.rand(count, 3, 1, 1, generator=generator) - 1
    return images + MAX_NOISE * _per_image(strength) * color * (x[:, None, None, :] * y[:, None, :, None])


def halo(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Sharpen beyond measure: add 2 * strength times the difference to a blurred copy, which rings outlines with light."""
    return images + 2 * _per_image(strength) * (images - blur(images, torch.full_like(strength, 0.6), generator))


def blob(images: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Round the shape off: blur by 3 * strength pixels, then restore the contrast, so that only the outline is lost."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    middle = (low + high) / 2
    gain = 1 + 4 * _per_image(strength)
    return torch.clamp(middle + gain * (blur(images, strength, generator) - middle), low, high)


DEGRADATIONS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "blur": blur,
    "noise": noise,
    "washout": washout,
    "tint": tint,
    "clutter": clutter,
    "occlusion": occlusion,
    "ghost": ghost,
    "dots": dots,
    "grid": grid,
    "halo": halo,
    "blob": blob,
}


def degrade(
    images: Tensor, strength: float | Tensor, generator: torch.Generator, kinds: Sequence[str] = tuple(DEGRADATIONS)
) -> Tensor:
    """Spoil every image by one degradation drawn from `kinds`.

    Args:
        images (Tensor): images in [0, 1], shape (batch_size, 3, 32, 32).
        strength (float | Tensor): 0 to 1, one for all or shape (batch_size,).
        generator (torch.Generator): draws the kinds and their details.
        kinds (Sequence[str]): names in `DEGRADATIONS`.

    Returns:
        Tensor: images in [0, 1], same shape.
    """
    unknown = sorted(set(kinds) - set(DEGRADATIONS))
    if unknown or not kinds:
        raise ValueError(f"kinds is {list(kinds)}; expected one or more of {', '.join(DEGRADATIONS)}.")
    strengths = torch.as_tensor(strength, dtype=images.dtype).expand(len(images))
    if len(images) and not (strengths.min() >= 0 and strengths.max() <= 1):
        raise ValueError(f"strength is {strength}; expected values from 0 to 1.")
    choice = torch.randint(len(kinds), (len(images),), generator=generator)
    spoiled = images.clone()
    for index, kind in enumerate(kinds):
        rows = (choice == index).nonzero()[:, 0]
        if len(rows):
            spoiled[rows] = DEGRADATIONS[kind](images[rows], strengths[rows], generator)
    return spoiled.clamp(0, 1)


def _per_image(strength: Tensor) -> Tensor:
    return strength[:, None, None, None]


def _disc(center: Tensor, radius: Tensor) -> Tensor:
    """Coverage of discs with the given centres (batch_size, 2) and radii (batch_size,): (batch_size, 32, 32)."""
    axis = torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
    x = axis[None, None, :] - center[:, 0, None, None]
    y = axis[None, :, None] - center[:, 1, None, None]
    return (0.5 + radius[:, None, None] - torch.hypot(x, y)).clamp(0, 1)


def _paint(images: Tensor, cover: Tensor, color: Tensor) -> Tensor:
    """Blend `color` (batch_size, 3) into `images` where `cover` (batch_size, 32, 32) is one."""
    return torch.lerp(images, color[:, :, None, None].expand_as(images), cover[:, None])
