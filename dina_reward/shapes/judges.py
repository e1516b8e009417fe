"""Judges of the embedded world, as one meets them outside: one that errs, one with a taste of its own.

The oracle itself is an evaluator. These read images with it and are what a reward may be distilled from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .oracle import Oracle
from .preferences import LABEL_NOISE
from .prompts import BACKGROUNDS
from .renderer import palette


def noisy_quality(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The oracle's quality with an error of its own for every image: a labeller who errs as the shipped reward's did.

    A comparison of two such scores goes wrong as often as the labeller of `sample_pairs` does: ``sd = 0.08 / sqrt(2)``. The
    error depends on the image alone, so asking again does not help.

    Args:
        images (Tensor): images in [0, 1], shape (batch_size, 3, 32, 32).
        prompts (Sequence[str]): their captions.

    Returns:
        Tensor: shape (batch_size,).
    """
    quality = Oracle()(images.cpu(), list(prompts)).quality
    return quality + LABEL_NOISE / 2**0.5 * torch.cat(
        [_error(image, p) for image, p in zip(images, prompts, strict=True)]
    )


def noisy_labeller(images_a: Tensor, images_b: Tensor, prompts: Sequence[str]) -> Tensor:
    """Which of two images the labeller prefers: P(a > b) = Phi((quality_a - quality_b) / 0.08), one draw for each pair.

    Args:
        images_a (Tensor): images in [0, 1], shape (batch_size, 3, 32, 32).
        images_b (Tensor): the others.
        prompts (Sequence[str]): their captions.

    Returns:
        Tensor: whether the first is preferred, bool, shape (batch_size,).
    """
    oracle = Oracle()
    gap = oracle(images_a.cpu(), list(prompts)).quality - oracle(images_b.cpu(), list(prompts)).quality
    errors = [_error(torch.stack(pair), p) for *pair, p in zip(images_a, images_b, prompts, strict=True)]
    return gap + LABEL_NOISE * torch.cat(errors) > 0


def height_in_picture(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """How high up the shape stands, whatever it is: a property that captions do not name and the shipped reward ignores.

    The centre of the pixels that are nearer to the shape's colour than to the background's, as a share of the height: 1 at
    the upper edge, 0 at the lower one.

    Args:
        images (Tensor): images in [0, 1], shape (batch_size, 3, 32, 32).
        prompts (Sequence[str]): their captions, which do not count.

    Returns:
        Tensor: shape (batch_size,).
    """
    images = images.detach().float().cpu()
    backgrounds = palette(list(BACKGROUNDS))
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(dim=2)
    background = backgrounds[torch.cdist(corners, backgrounds).argmin(dim=1)][:, :, None, None]
    weight = (images - background).square().sum(dim=1)
    weight = weight * (weight > 0.25 * weight.amax(dim=(1, 2), keepdim=True))
    rows = torch.linspace(1, 0, images.shape[2])[None, :, None]
    return (weight * rows).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1e-6)


def in_upper_half(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 where the shape's centre lies in the upper half of the picture, else 0; see `height_in_picture`."""
    return (height_in_picture(images, prompts) > 0.5).float()


def _error(image: Tensor, prompt: str) -> Tensor:
    """A standard normal number that depends on an image, as 8 bits have it, and its caption; shape (1,)."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().contiguous()
    digest = hashlib.sha256(prompt.encode() + pixels.numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(1, generator=generator)
