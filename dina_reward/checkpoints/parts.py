"""What a checkpoint consists of, in any layout, and how its parts are read and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dina_reward.modeling import LatentRewardConfig


if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_SAFE_LORA_INITS = (True, False, "gaussian", "orthogonal")


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged, or does not fit; the message says which part."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a reward checkpoint.

    Args:
        config: the reward's configuration; ``backbone_config`` is empty when the format does not record it.
        lora_config: PEFT configuration of the adapter.
        adapter: LoRA tensors under PEFT's keys (``base_model.model....lora_A.weight``).
        head: state dict of the head.
    """

    config: LatentRewardConfig
    lora_config: LoraConfig
    adapter: dict[str, Tensor]
    head: dict[str, Tensor]


def check_state(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], part: str) -> None:
    """Compares keys, shapes and finiteness of a loaded state dict with the live one.

    Raises:
        CheckpointError: missing or surplus keys, other shapes, or values that are not finite.
    """
    missing, surplus = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or surplus:
        raise CheckpointError(
            f"the checkpoint's {part} does not fit: {len(missing)} keys missing {missing[:4]}, {len(surplus)} keys "
            f"surplus {surplus[:4]}. It belongs to another configuration or backbone."
        )
    for key, tensor in given.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"the checkpoint's {part} has {key} of shape {tuple(tensor.shape)}, expected "
                f"{tuple(expected[key].shape)}. It belongs to another configuration or backbone."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"the checkpoint's {part} has values that are not finite in {key}")


def existing(path: Path) -> Path:
    """The path, if there is a file; else a `CheckpointError`."""
    if not path.is_file():
        raise CheckpointError(f"the checkpoint is incomplete: {path} is missing")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` for anything else."""
    try:
        values = json.loads(existing(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a whole safetensors file, on the CPU; `CheckpointError` for a damaged one."""
    try:
        return load_file(existing(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error


def count_parameters(path: Path) -> int:
    """Numbers in a safetensors file, of which only the header is read; `CheckpointError` for a damaged one."""
    try:
        with safe_open(existing(path), framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error


def read_lora_config(directory: Path) -> LoraConfig:
    """PEFT configuration of an adapter; `CheckpointError` unless it is a LoRA that leaves base weights alone."""
    values = read_json(directory / ADAPTER_CONFIG_FILE)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory} holds a {values.get('peft_type')} adapter; a reward needs LORA")
    if values.get("init_lora_weights", True) not in _SAFE_LORA_INITS:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG_FILE} has init_lora_weights={values['init_lora_weights']!r}, which alters base "
            "weights; convert the adapter to a plain LoRA with PEFT first"
        )
    from peft import LoraConfig

    known = {f.name for f in fields(LoraConfig)}
    surplus = {key: value for key, value in values.items() if key not in known and value not in (None, False, {}, [])}
    if surplus.keys() - {"peft_version", "qalora_group_size", "megatron_core"}:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG_FILE} sets options that the installed PEFT does not know: {sorted(surplus)}"
        )
    return LoraConfig(**{key: value for key, value in values.items() if key in known and key != "auto_mapping"})
