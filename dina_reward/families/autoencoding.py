"""Pixels <-> latents for families whose VAE is an `AutoencoderKL`; evaluation, the CLI and examples use it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@torch.no_grad()
def encode_kl(pipeline: Any, images: Sequence[Image.Image], multiple: int) -> Tensor:
    """``(mode of q(z | x) - shift_factor) * scaling_factor``.

    Args:
        pipeline: diffusers pipeline with ``vae`` and ``image_processor``.
        images: images of one size; each side is rounded down to a multiple of ``multiple`` pixels.

    Returns:
        `Tensor`: shape ``(batch, channels, height, width)``, float32.

    Raises:
        ValueError: images of different sizes, or smaller than ``multiple``.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images of one batch must have one size, got {sorted(sizes)}")
    width, height = (side - side % multiple for side in sizes.pop())
    if not width or not height:
        raise ValueError(f"images must be at least {multiple} x {multiple} pixels, got {width} x {height}")
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(
        [image.convert("RGB") for image in images], height=height, width=width
    ).to(vae.device, vae.dtype)
    latents = vae.encode(pixels).latent_dist.mode().float()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_kl(pipeline: Any, latents: Tensor) -> Tensor:
    """Images in [0, 1], shape ``(batch, 3, height, width)``, of scaled latents ``(batch, channels, height, width)``."""
    vae = pipeline.vae
    unscaled = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    pixels = vae.decode(unscaled.to(vae.device, vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(pixels.float(), output_type="pt")
