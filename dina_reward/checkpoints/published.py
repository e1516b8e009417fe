"""Reader of the published reference layout: a LoRA as PEFT writes it, and a pickled head that is read as tensors alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dina_reward.checkpoints.parts import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    Checkpoint,
    CheckpointError,
    existing,
    read_json,
    read_lora_config,
    read_safetensors,
)
from dina_reward.families import families
from dina_reward.modeling import LatentRewardConfig
from dina_reward.modeling.heads.config import RewardHeadConfig


REFERENCE_ADAPTER_DIRECTORY = Path("checkpoint", "backbone_lora")
REFERENCE_HEAD_FILE = Path("checkpoint", "rm_head.pt")


def read_published(directory: Path, model: dict[str, Any]) -> Checkpoint:
    """Reads the reference layout, whose ``config.json`` holds ``model``."""
    adapter_directory = directory / REFERENCE_ADAPTER_DIRECTORY
    lora_config = read_lora_config(adapter_directory)
    try:
        config = _reference_config(model, read_json(adapter_directory / ADAPTER_CONFIG_FILE))
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{directory / 'config.json'} describes no reward: {reason}") from error
    return Checkpoint(
        config=config,
        lora_config=lora_config,
        adapter=read_safetensors(adapter_directory / ADAPTER_FILE),
        head=_read_pickled_head(directory / REFERENCE_HEAD_FILE),
    )


def _reference_config(model: dict[str, Any], adapter_config: dict[str, Any]) -> LatentRewardConfig:
    head = dict(model["reward_head"])
    unsupported = {
        "use_t_embed": (model.get("use_t_embed", True), True),
        "use_lora": (model.get("use_lora", True), True),
        "reward_head.out_dim": (head.get("out_dim", 1), 1),
    }
    for key, (found, needed) in unsupported.items():
        if found != needed:
            raise CheckpointError(f"reference checkpoint with {key}={found!r}; only {needed!r} is supported")
    backbone_class = (adapter_config.get("auto_mapping") or {}).get("base_model_class")
    classes = {family.name: family.reference_backbone_class for family in families()}
    by_class = {backbone: name for name, backbone in classes.items() if backbone is not None}
    if backbone_class not in by_class:
        raise CheckpointError(
            f"reference checkpoint with backbone class {backbone_class!r}; supported are {sorted(by_class)}"
        )
    width = head.get("width", -1)
    return LatentRewardConfig(
        family=by_class[backbone_class],
        num_layers=model["num_transformer_layers"],
        visual_taps=tuple(model["visual_head_idx"]),
        text_taps=tuple(model["text_head_idx"] or ()),
        backbone_model_id=model.get("backbone_model_id"),
        head=RewardHeadConfig(
            width=None if width in (None, -1) else width,
            num_queries=head.get("num_queries", 4),
            num_attention_heads=head.get("num_attn_heads", 8),
            project_inputs=head.get("use_proj_in", False),
            use_text_features=model.get("use_text_features", True),
            dropout=head.get("dropout", 0.0),
            squash=model.get("use_logistic", False),
        ),
    )


def _read_pickled_head(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(existing(path), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive makes torch stumble in many ways
        raise CheckpointError(f"{path} is truncated or holds more than tensors: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} must hold a state dict of tensors")
    return state
