"""A reward for clients that give paths alone: its text encoders and autoencoder come with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dina_reward import LatentReward


def load_reward(
    model_path: str, base_model_path: str | None = None, *, device: Any = None, dtype: Any = "float32"
) -> LatentReward:
    """A reward on the pipeline that it was trained on; the pipeline's own denoiser is what it runs on.

    Args:
        model_path: directory, hub id or shipped name of the reward.
        base_model_path: of the pipeline. Default: the one that the checkpoint names.
        device: default: cuda if there is one, else cpu.
        dtype: a `torch.dtype` or its name.

    Raises:
        ValueError: neither names a pipeline, or they do not fit together.
    """
    from pathlib import Path

    import torch

    from dina_reward import LatentReward
    from dina_reward.backbones.pipelines import load_pipeline
    from dina_reward.checkpoints import read_checkpoint, resolve_checkpoint

    directory = resolve_checkpoint(model_path)
    base = base_model_path or read_checkpoint(directory).config.backbone_model_id
    if base is None:
        raise ValueError(f"{model_path} names no backbone; give base_model_path")
    if base.startswith(".") and base_model_path is None:
        base = str((Path(directory) / base).resolve())
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    pipeline = load_pipeline(base, dtype=dtype).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    return LatentReward.from_pretrained(directory, pipeline=pipeline, share_backbone=True)
