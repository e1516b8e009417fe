"""The reward that a server serves: its backbone alone, or with the text encoders of its pipeline."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import HFValidationError

from dina_reward.backbones.pipelines import load_pipeline
from dina_reward.checkpoints import read_checkpoint, resolve_checkpoint
from dina_reward.quiet import no_loading_bars
from dina_reward.reward import LatentReward


def load_served_reward(
    model_path: str,
    base_model_path: str | None = None,
    *,
    dtype: str = "float32",
    device: str | None = None,
    text_encoders: bool = True,
) -> LatentReward:
    """Loads a reward to serve it, and scores one row with it, so that the first request does not pay for that.

    Args:
        model_path: directory or hub id of the reward.
        base_model_path: path or hub id of the diffusers pipeline that it reads; default: the one that the checkpoint names.
        dtype: of the backbone and text encoders: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: default: the GPU, where there is one.
        text_encoders: load them too, so that requests may bring prompts as text; without them only the first blocks of the
            denoiser are in memory.

    Raises:
        ValueError: there is no such reward, pipeline or device, or they do not fit.
    """
    directory = resolve_checkpoint(model_path)
    base = base_model_path or read_checkpoint(directory).config.backbone_model_id
    if base is None:
        raise ValueError("the checkpoint names no backbone; give the pipeline with --base-model-path")
    if base.startswith(".") and base_model_path is None:
        base = str((directory / base).resolve())
    options: dict[str, Any] = {"torch_dtype": getattr(torch, dtype), "device": _device(device)}
    with no_loading_bars():
        if text_encoders:
            reward = _with_text_encoders(str(directory), base, options)
        else:
            reward = LatentReward.from_pretrained(directory, backbone=base, **options)
    warm_up(reward)
    return reward


def warm_up(reward: LatentReward) -> float:
    """The score of a latent of zeros of the smallest size."""
    family, config = reward.family, reward.config.backbone_config
    side = 4 * family.latent_multiple(config)
    frames = (1,) if family.has_frames else ()
    latents = torch.zeros((1, family.latent_channels(config), *frames, side, side), device=reward.device)
    if reward.prompt_encoder.pipeline is not None:
        return float(reward(latents, ["a picture"], seed=[0]))
    return float(reward(latents, seed=[0], **_zero_embeddings(reward)))


def _zero_embeddings(reward: LatentReward) -> dict[str, Any]:
    width, pooled = reward.family.text_sizes(reward.config.backbone_config)
    tokens = 8
    embeddings = {"prompt_embeds": torch.zeros((1, tokens, width), device=reward.device)}
    if pooled is not None:
        embeddings["pooled_prompt_embeds"] = torch.zeros((1, pooled), device=reward.device)
    if reward.family.has_text_mask:
        embeddings["prompt_embeds_mask"] = torch.ones((1, tokens), dtype=torch.bool, device=reward.device)
    return embeddings


def _with_text_encoders(directory: str, base: str, options: dict[str, Any]) -> LatentReward:
    """The blocks that the reward reads and the text encoders; the rest of the pipeline is let go."""
    try:
        pipeline = load_pipeline(base, dtype=options["torch_dtype"])
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"cannot load the pipeline {base!r}: {error}. Give another one with --base-model-path"
        ) from error
    reward = LatentReward.from_pretrained(directory, pipeline=pipeline, **options)
    for name in (reward.family.denoiser_attribute, "vae"):
        pipeline.register_modules(**{name: None})
    pipeline.to(reward.device)
    return reward


def _device(name: str | None) -> str:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error
    return name
