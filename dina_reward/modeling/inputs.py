"""Checks of what users hand to a reward; every message says what was given, what was expected and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from dina_reward.checks.late import LateChecks
from dina_reward.checks.tensors import check_dense, check_tensor
from dina_reward.checks.values import is_int
from dina_reward.families import Conditioning, ModelFamily


_LARGEST_SIDE = 65_536


class NonFiniteError(ValueError):
    """Latents or scores are NaN or infinite."""


def check_latents(
    latents: Tensor,
    family: ModelFamily,
    denoiser_config: Mapping[str, Any],
    device: torch.device,
    late: LateChecks | None = None,
) -> None:
    """Type, dtype, device, layout and finiteness of latents.

    Args:
        late: takes the check of finiteness, which waits for the device; without it, it is made here.

    Raises:
        ValueError: with the fault.
        NonFiniteError: values are NaN or infinite.
    """
    check_tensor("latents", latents, "call the pipeline with output_type='latent'")
    check_dense("latents", latents)
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
    checks = LateChecks() if late is None else late
    checks.add(
        finite,
        lambda: NonFiniteError(f"latents of rows {rows_outside(finite)} are not finite; the sampler has diverged"),
    )
    if late is None:
        checks.settle()


def rows_outside(holds: Tensor) -> list[int]:
    """The first rows, by the last dimension, for which a condition does not hold."""
    return torch.unique((~holds).nonzero()[:, -1]).tolist()[:8]


def unscaled_note(latents: Tensor, pipeline: Any) -> str | None:
    """A warning for latents whose spread is that of the autoencoder's own, before ``* scaling_factor``; or None.

    Generators' latents are scaled to a standard deviation near 1, which those for the decoder are not. Where
    `scaling_factor` is near 1 the two cannot be told apart, and nothing is said.
    """
    config = getattr(getattr(pipeline, "vae", None), "config", None)
    if config is None or config.get("latents_mean") is not None or config.get("scaling_factor") is None:
        return None
    unscaled, spread = 1 / float(config["scaling_factor"]), float(latents.detach().float().std())
    if latents[0].numel() < 2 or not spread > 0 or abs(math.log(unscaled)) < 0.3:
        return None
    if math.log(spread) / math.log(unscaled) < 0.8:
        return None
    return (
        f"the latents have a standard deviation of {spread:.2f}; a generator's are near 1, and those that are un-scaled for "
        f"the decoder (latents / scaling_factor + shift_factor) near {unscaled:.2f}: pass the latents as the pipeline "
        "returns them for output_type='latent'"
    )


def length_note(conditioning: Conditioning, expected: int | None) -> str | None:
    """A warning for prompt embeddings of another length than the reward encodes prompts to; or None.

    Args:
        expected: tokens; ``None`` where they vary.
    """
    length = conditioning.prompt_embeds.shape[1]
    if expected is None or length == expected or conditioning.prompt_embeds_mask is not None:
        return None
    return (
        f"prompt_embeds have {length} tokens; this reward encodes prompts to {expected}, and scores move with the padding: "
        "encode with its max_sequence_length, or pass prompts"
    )


def expand_prompts(prompts: str | Sequence[str], batch: int) -> list[str]:
    """One prompt per latent.

    Raises:
        ValueError: another number of prompts than latents.
    """
    if isinstance(prompts, str):
        return [prompts] * batch
    if isinstance(prompts, (Mapping, Set, bytes)) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a string or a list of strings, got {type(prompts).__name__}")
    if len(prompts) != batch:
        raise ValueError(f"got {len(prompts)} prompts for {batch} latents; give one prompt per latent, or one string")
    return list(prompts)


def check_size(latents: Tensor, height: int | None, width: int | None) -> None:
    """Refuses a size in pixels that spatial latents cannot be of.

    Args:
        latents: spatial layout, ``(batch, ..., height, width)``.

    Raises:
        ValueError: no positive integers, or another aspect ratio than that of the latents.
    """
    given = [size for size in (height, width) if size is not None]
    if not all(is_int(size) and 0 < size <= _LARGEST_SIDE for size in given):
        raise ValueError(f"height and width must be positive numbers of pixels, got {height!r} and {width!r}")
    rows, columns = latents.shape[-2:]
    if height is not None and width is not None and abs(height * columns - width * rows) > max(height, width):
        raise ValueError(
            f"the latents are {columns} x {rows}, which is not the shape of an image of {width} x {height} pixels"
        )


def check_embeddings(
    conditioning: Conditioning, batch: int, family: ModelFamily, denoiser_config: Mapping[str, Any]
) -> None:
    """Layout of prompt embeddings and their number.

    Raises:
        ValueError: with the fault.
    """
    family.check_conditioning(conditioning, denoiser_config)
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        embeds = getattr(conditioning, name)
        if embeds is None:
            continue
        check_dense(name, embeds)
        if not embeds.is_floating_point() or embeds.is_meta:
            raise ValueError(f"{name} must be floating-point numbers, got {embeds.dtype} on {embeds.device}")
        if not bool(torch.isfinite(embeds).all()):
            raise NonFiniteError(f"{name} hold NaN or infinite values")
    if len(conditioning) not in (1, batch):
        raise ValueError(
            f"prompt_embeds have {len(conditioning)} rows for {batch} latents; give one row per latent, or one for all "
            "(without the negative half of classifier-free guidance)"
        )
