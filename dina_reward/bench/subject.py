"""What is measured: a generator with a reward on it, loaded, or of random weights at the size of a published model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from dina_reward.backbones.cards import meta_pipeline
from dina_reward.backbones.structures import ModelStructure
from dina_reward.families import Conditioning, ModelFamily, family_of
from dina_reward.modeling import LatentRewardConfig, default_reward_config
from dina_reward.reward import LatentReward


@dataclass(frozen=True)
class Subject:
    """A generator whose rewards, steps and decoder are measured.

    Args:
        name: of the model.
        weights: ``"random"`` or ``"loaded"``.
        pipeline: with denoiser, VAE and scheduler; text encoders are not needed.
        reward_config: of the reward.
        latent_shape: of one latent in the spatial layout.
        text_tokens: length of an encoded prompt.
        height, width: of an image in pixels.
    """

    name: str
    weights: str
    pipeline: Any
    reward_config: LatentRewardConfig
    latent_shape: tuple[int, ...]
    text_tokens: int
    height: int
    width: int

    @property
    def family(self) -> ModelFamily:
        """The model family."""
        return family_of(self.pipeline)

    @property
    def denoiser(self) -> nn.Module:
        """The generator's denoiser."""
        return getattr(self.pipeline, self.family.denoiser_attribute)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.denoiser.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.denoiser.parameters()).device

    def reward(self, share_backbone: bool) -> LatentReward:
        """A reward of random LoRA and head, whose scores cost what those of a trained one do; merged if standalone."""
        reward = LatentReward.from_config(
            self.reward_config, pipeline=self.pipeline, share_backbone=share_backbone
        ).eval()
        if not share_backbone:
            reward.merge_lora()
        return reward

    def latents(self, batch: int) -> Tensor:
        """Random latents, shape ``(batch, *latent_shape)``."""
        generator = torch.Generator(self.device).manual_seed(batch)
        latents = torch.randn(batch, *self.latent_shape, generator=generator, device=self.device)
        return latents.to(self.dtype)

    def conditioning(self, batch: int) -> Conditioning:
        """Random encodings of ``batch`` different prompts."""
        width, pooled_width = self.family.text_sizes(dict(self.denoiser.config))  # type: ignore[arg-type]
        generator = torch.Generator(self.device).manual_seed(batch)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        tokens = torch.randn(batch, self.text_tokens, width, **options).to(self.dtype)
        pooled = None if pooled_width is None else torch.randn(batch, pooled_width, **options).to(self.dtype)
        mask = (
            torch.ones(tokens.shape[:2], dtype=torch.bool, device=self.device) if self.family.has_text_mask else None
        )
        return Conditioning(tokens, pooled, mask)


def loaded_subject(
    pipeline: Any,
    name: str,
    *,
    height: int | None = None,
    width: int | None = None,
    max_sequence_length: int | None = None,
) -> Subject:
    """A pipeline with its own weights, and prompts as long as its reward encodes them.

    Raises:
        ValueError: the pipeline belongs to no supported family, or its configuration names no image size.
    """
    family = family_of(pipeline)
    config = dict(getattr(pipeline, family.denoiser_attribute).config)
    if (height is None or width is None) and not isinstance(config.get("sample_size"), int):
        raise ValueError(f"{name}'s configuration names no image size; give both height and width")
    side = int(config.get("sample_size") or 0) * int(pipeline.vae_scale_factor)
    options = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    reward_config = default_reward_config(pipeline, backbone_config=config, **options)
    longest = reward_config.max_sequence_length
    tokens = family.embeds_length(pipeline, longest) or longest or _tokenizer_length(pipeline)
    return _subject(pipeline, name, "loaded", (height or side, width or side), tokens, reward_config)


def _tokenizer_length(pipeline: Any) -> int:
    """What the tokenizer cuts prompts to; some have no limit and give an absurd number."""
    return min(int(getattr(getattr(pipeline, "tokenizer", None), "model_max_length", 512)), 512)


def random_subject(
    structure: ModelStructure,
    *,
    device: torch.device,
    dtype: torch.dtype,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
) -> Subject:
    """A published model at its real size with random weights, made on the device; nothing is downloaded.

    Raises:
        ValueError: the weights do not fit into the device's free memory.
    """
    family, meta = structure.family, meta_pipeline(structure)
    parts = {name: getattr(meta, name) for name in (family.denoiser_attribute, "vae")}
    needed = sum(p.numel() for part in parts.values() for p in part.parameters()) * dtype.itemsize
    free = free_memory(device)
    if needed > 0.8 * free:
        raise ValueError(
            f"{structure.name} in {dtype} takes {needed / 2**30:.1f} GiB of weights, and {free / 2**30:.1f} GiB are free on "
            f"{device}; take a smaller model or another device"
        )
    for name, part in parts.items():
        with made_on(device, dtype, seed):
            made = type(part).from_config(dict(part.config))
        setattr(meta, name, made.requires_grad_(False).eval())
    size = (height or structure.height, width or structure.width)
    config = dict(getattr(meta, family.denoiser_attribute).config)
    if None in size:
        side = int(config["sample_size"]) * int(meta.vae_scale_factor)
        size = (size[0] or side, size[1] or side)
    reward_config = default_reward_config(meta, backbone_config=config)
    return _subject(meta, structure.name, "random", (size[0] or 0, size[1] or 0), structure.text_tokens, reward_config)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _subject(
    pipeline: Any, name: str, weights: str, size: tuple[int, int], text_tokens: int, reward_config: LatentRewardConfig
) -> Subject:
    family = family_of(pipeline)
    config = dict(getattr(pipeline, family.denoiser_attribute).config)
    return Subject(
        name=name,
        weights=weights,
        pipeline=pipeline,
        reward_config=reward_config,
        latent_shape=tuple(family.latent_shape(pipeline, *size, config)),
        text_tokens=text_tokens,
        height=size[0],
        width=size[1],
    )


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Modules made inside have their parameters on the device in the dtype at once, without a float32 copy in between."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
