"""Checks of what users hand to a reward; every message says what was given, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.families import Conditioning, ModelFamily


class NonFiniteError(ValueError):
    """Latents or scores are NaN or infinite."""


def check_latents(
    latents: Tensor, family: ModelFamily, denoiser_config: Mapping[str, Any], device: torch.device
) -> None:
    """Type, dtype, device, layout and finiteness of latents.

    Raises:
        ValueError: with the fault.
        NonFiniteError: values are NaN or infinite.
    """
    if not isinstance(latents, Tensor):
        raise ValueError(
            f"latents must be a torch.Tensor, got {type(latents).__name__}; call the pipeline with output_type='latent'"
        )
    if not latents.is_floating_point():
        raise ValueError(
            f"latents have dtype {latents.dtype}; expected floating-point latents (if these are pixels, encode them with "
            "the VAE)"
        )
    if latents.ndim > 0 and latents.shape[0] == 0:
        raise ValueError("latents are an empty batch")
    family.check_latents(latents, denoiser_config)
    if latents.device != device:
        raise ValueError(f"latents are on {latents.device} but the reward is on {device}; move one of them")
    finite = torch.isfinite(latents).flatten(1).all(dim=1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(f"latents of rows {bad[:8]} are not finite; the sampler has diverged")


def expand_prompts(prompts: str | Sequence[str], batch: int) -> list[str]:
    """One prompt per latent.

    Raises:
        ValueError: another number of prompts than latents.
    """
    if isinstance(prompts, str):
        return [prompts] * batch
    if len(prompts) != batch:
        raise ValueError(f"got {len(prompts)} prompts for {batch} latents; give one prompt per latent, or one string")
    return list(prompts)


def check_embeddings(
    conditioning: Conditioning, batch: int, family: ModelFamily, denoiser_config: Mapping[str, Any]
) -> None:
    """Layout of prompt embeddings and their number.

    Raises:
        ValueError: with the fault.
    """
    family.check_conditioning(conditioning, denoiser_config)
    if len(conditioning) not in (1, batch):
        raise ValueError(
            f"prompt_embeds have {len(conditioning)} rows for {batch} latents; give one row per latent, or one for all "
            "(without the negative half of classifier-free guidance)"
        )
