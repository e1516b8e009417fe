"""Pixels <-> latents for families whose VAE is an `AutoencoderKL` or `AutoencoderDC`; evaluation and the CLI use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def latent_scaling(config: Mapping[str, Any], latents: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale between an autoencoder's own latents and those of the generator, broadcastable over ``latents``.

    Shift and scale are ``shift_factor`` and ``scaling_factor``; of autoencoders with the mean and standard deviation of
    each latent channel (``latents_mean``, ``latents_std``), the mean and ``scaling_factor / latents_std``.
    """
    scale = torch.tensor(float(config["scaling_factor"]), device=latents.device)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return torch.tensor(float(config.get("shift_factor") or 0.0), device=latents.device), scale
    mean, std = (torch.tensor(list(values), device=latents.device).view(1, -1, 1, 1) for values in (mean, std))
    return mean, scale / std


def image_pixels(pipeline: Any, images: Sequence[Image.Image], multiple: int) -> Tensor:
    """Pixels in the range, dtype and place that the pipeline's VAE takes.

    Args:
        pipeline: diffusers pipeline with ``vae`` and ``image_processor`` or ``video_processor``.
        images: images of one size; each side is rounded down to a multiple of ``multiple`` pixels.

    Returns:
        `Tensor`: shape ``(batch, 3, height, width)``.

    Raises:
        ValueError: images of different sizes, or smaller than ``multiple``.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images of one batch must have one size, got {sorted(sizes)}")
    width, height = (side - side % multiple for side in sizes.pop())
    if not width or not height:
        raise ValueError(f"images must be at least {multiple} x {multiple} pixels, got {width} x {height}")
    processor = getattr(pipeline, "image_processor", None) or pipeline.video_processor
    pixels = processor.preprocess([image.convert("RGB") for image in images], height=height, width=width)
    return pixels.to(pipeline.vae.device, pipeline.vae.dtype)


@torch.no_grad()
def encode_kl(pipeline: Any, images: Sequence[Image.Image], multiple: int) -> Tensor:
    """``(mode of q(z | x) - shift) * scale``, see `latent_scaling`; arguments and errors as for `image_pixels`.

    Autoencoders without a distribution (`AutoencoderDC`) give ``z`` itself.

    Returns:
        `Tensor`: shape ``(batch, channels, height, width)``, float32.
    """
    vae = pipeline.vae
    encoded = vae.encode(image_pixels(pipeline, images, multiple))
    latents = (encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent).float()
    shift, scale = latent_scaling(vae.config, latents)
    return (latents - shift) * scale


@torch.no_grad()
def decode_kl(pipeline: Any, latents: Tensor) -> Tensor:
    """Images in [0, 1], shape ``(batch, 3, height, width)``, of scaled latents ``(batch, channels, height, width)``."""
    vae = pipeline.vae
    shift, scale = latent_scaling(vae.config, latents)
    unscaled = latents.float() / scale + shift
    pixels = vae.decode(unscaled.to(vae.device, vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(pixels.float(), output_type="pt")
