"""What a checkpoint consists of, in any layout, and how its parts are read and checked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from re import _parser as re_parser  # type: ignore[attr-defined]
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dina_reward.checkpoints.atomic import settled
from dina_reward.checks import stored
from dina_reward.checks.values import is_int, scheduler_config_checked
from dina_reward.families import get_family
from dina_reward.modeling import LatentRewardConfig


if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
_SAFE_LORA_INITS = (True, False, "gaussian", "orthogonal")
_LORA_OPTIONS = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layers_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "fan_in_fan_out",
    "modules_to_save",
    "init_lora_weights",
    "inference_mode",
    "peft_type",
    "task_type",
}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
}
"""Options that a plain LoRA's file has beside those above; they are not handed to PEFT, which imports what some name."""
_MOST_PATTERNS = 10_000
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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


def parsed_config(values: Mapping[str, Any], where: Path) -> LatentRewardConfig:
    """The configuration that a file holds; `CheckpointError`, naming the file, for values that cannot be."""
    try:
        config = LatentRewardConfig.from_dict(values)
        scheduler_config_checked(config.scheduler_config)
        get_family(config.family)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where} describes no reward: {error}") from error
    return config


def check_sizes(checkpoint: Checkpoint) -> Checkpoint:
    """Compares the sizes that a checkpoint's configurations name with its tensors, before anything is built from them.

    Raises:
        CheckpointError: naming a size that no tensor has; or tensors of numbers that are not floating point.
    """
    adapter, head, config = checkpoint.adapter, checkpoint.head, checkpoint.config.head
    for part, tensors in (("LoRA adapter", adapter), ("head", head)):
        wrong = sorted(name for name, tensor in tensors.items() if tensor.dtype not in _FLOATS)
        if not tensors or wrong:
            found = f"{wrong[0]} of dtype {tensors[wrong[0]].dtype}" if wrong else "no tensors"
            raise CheckpointError(f"the checkpoint's {part} has {found}; expected float32, bfloat16 or float16")
    lora = checkpoint.lora_config
    ranks = {tensor.shape[0] for name, tensor in adapter.items() if ".lora_A." in name and tensor.ndim > 0}
    dimensions = {size for tensor in head.values() if tensor.numel() for size in tensor.shape}
    sizes: dict[str, tuple[Any, float]] = {
        "LoRA rank": (max([lora.r, *(lora.rank_pattern or {}).values()]), max(ranks, default=0)),
        "head width": (config.width or 0, max(dimensions, default=0)),
        "head num_queries": (config.num_queries if config.kind == "query" else 0, max(dimensions, default=0)),
        "head num_hidden_layers": (config.num_hidden_layers if config.kind != "query" else 0, len(head)),
    }
    for name, (asked, largest) in sizes.items():
        if not is_int(asked) or asked > largest:
            raise CheckpointError(f"the checkpoint's {name} is {asked!r}, but its tensors have at most {largest}")
    return checkpoint


def existing(path: Path) -> Path:
    """Where the file is, if there is one (see `settled`); else a `CheckpointError`."""
    found = settled(path)
    if not found.is_file():
        raise CheckpointError(f"the checkpoint is incomplete: {path} is missing")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` for anything else."""
    try:
        values = stored.read_json(existing(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(values).__name__}")
    return values


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a whole safetensors file, on the CPU; `CheckpointError` for a damaged one."""
    file = existing(path)
    try:
        return stored.read_tensors(file)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def count_parameters(path: Path) -> int:
    """Numbers in a safetensors file, of which only the header is read; `CheckpointError` for a damaged one."""
    where = existing(path)
    try:
        with stored.open_tensors(where) as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except ValueError as error:
        raise CheckpointError(str(error)) from error


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

    from dina_reward.modeling.lora import new_lora_config

    known = {"exclude_modules", *(f.name for f in fields(LoraConfig))}
    surplus = sorted(
        key
        for key, value in values.items()
        if key not in _LORA_OPTIONS and value not in (None, False, {}, []) and key not in _WITHOUT_EFFECT
    )
    if surplus:
        raise CheckpointError(
            f"{directory / ADAPTER_CONFIG_FILE} sets options that a reward's LoRA does not have: {surplus}"
        )
    check_patterns(values, directory / ADAPTER_CONFIG_FILE)
    return new_lora_config(**{key: value for key, value in values.items() if key in known & _LORA_OPTIONS})


def check_patterns(values: Mapping[str, Any], where: Path) -> None:
    """Refuses names of layers that are no valid regular expressions, or such as take forever on some names.

    Raises:
        CheckpointError: naming the pattern.
    """
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = values.get(key)
        if not isinstance(value, (str, list, dict, NoneType)):
            raise CheckpointError(f"{where} has a {key} that is no list of names of layers")
        patterns = [value] if isinstance(value, str) else list(value or ())
        if len(patterns) > _MOST_PATTERNS or not all(isinstance(pattern, str) for pattern in patterns):
            raise CheckpointError(f"{where} has a {key} that is no list of names of layers")
        for pattern in patterns:
            if not is_bounded_pattern(pattern):
                raise CheckpointError(
                    f"{where} has the pattern {pattern[:80]!r} in {key}, which is invalid or could take forever to match; "
                    "patterns may repeat single characters, at most four times without a limit"
                )


def is_bounded_pattern(pattern: str) -> bool:
    """Whether a regular expression is valid and matches any name of a layer in a short time: it repeats no groups."""
    if len(pattern) > 500:
        return False
    try:
        parsed = re_parser.parse(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return _unlimited_repeats(parsed) <= 4


def _unlimited_repeats(parsed: Any) -> float:
    """Repetitions without a limit in a parsed expression; infinity if a group is repeated or referred to."""
    total: float = 0
    for operation, argument in parsed:
        name = str(operation)
        if name.endswith("REPEAT"):
            _, most, body = argument
            single = len(body) == 1 and str(body[0][0]) in ("ANY", "IN", "LITERAL", "NOT_LITERAL")
            total += (most > 64) if single else math.inf
        elif name == "BRANCH":
            total += sum(_unlimited_repeats(part) for part in argument[1])
        elif name == "SUBPATTERN":
            total += _unlimited_repeats(argument[-1])
        elif name not in ("ANY", "IN", "LITERAL", "NOT_LITERAL", "AT"):
            return math.inf
    return total
