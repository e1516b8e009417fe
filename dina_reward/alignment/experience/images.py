"""Decoded images and videos, as rewards and judges look at them."""

from __future__ import annotations

from torch import Tensor


_ROUNDING = 1e-3


def checked_images(images: Tensor, batch_size: int) -> Tensor:
    """Decoded images or videos as float32.

    Raises:
        ValueError: they are not of shape ``(batch_size, 3, height, width)`` or, for videos, ``(batch_size, frames, 3,
            height, width)``, with values in [0, 1].
    """
    if images.ndim not in (4, 5) or images.shape[0] != batch_size or images.shape[-3] != 3:
        raise ValueError(
            f"decoded images have shape {tuple(images.shape)}; expected ({batch_size}, 3, height, width), or for videos "
            f"({batch_size}, frames, 3, height, width)"
        )
    images = images.float()
    low, high = (float(bound) for bound in images.detach().aminmax())
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(
            f"decoded images lie in [{low:.4g}, {high:.4g}]; expected [0, 1]. NaN: run the VAE in float32 or bfloat16"
        )
    return images


def still_images(images: Tensor) -> Tensor:
    """Images as they are, and of videos ``(batch, frames, 3, height, width)`` the frame in the middle."""
    return images[:, images.shape[1] // 2] if images.ndim == 5 else images
