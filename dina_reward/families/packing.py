"""Families whose pipelines return 2 x 2 packed latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.families.base import ModelFamily
from dina_reward.families.layout import pack_2x2, token_grid, unpack_2x2


PIXELS_PER_TOKEN = 16
"""Per side: the autoencoders of these families compress by 8, and a token holds 2 x 2 latent pixels."""


class Packed2x2Family(ModelFamily):
    """Base of families whose pipeline returns ``(batch, tokens, 4 channels)``; the spatial layout is accepted as well."""

    def latent_channels(self, denoiser_config: Mapping[str, Any]) -> int:
        return int(denoiser_config["in_channels"]) // 4

    def latent_multiple(self, denoiser_config: Mapping[str, Any]) -> int:
        return 2

    def unpack_latents(
        self, latents: Tensor, denoiser_config: Mapping[str, Any], height: int | None = None, width: int | None = None
    ) -> Tensor:
        if latents.ndim != 3 or latents.shape[-1] != int(denoiser_config["in_channels"]):
            return latents
        return unpack_2x2(latents, token_grid(latents.shape[1], height, width, PIXELS_PER_TOKEN, self.name))

    def pack_latents(self, latents: Tensor) -> Tensor:
        return pack_2x2(latents)

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, latent_shape: Sequence[int]) -> None:
        sigmas = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(sigmas=sigmas, device="cpu", mu=exponential_shift(scheduler, latent_shape))


def exponential_shift(scheduler: Any, latent_shape: Sequence[int]) -> float:
    """``mu`` of a scheduler that shifts by image size, for 2 x 2 packed latents of a spatial shape."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    return calculate_shift(
        (latent_shape[-2] // 2) * (latent_shape[-1] // 2),
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
