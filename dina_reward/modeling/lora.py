"""LoRAs that leave layers out, also under PEFT before 0.14, which has no ``exclude_modules``."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


EXCLUDES = "exclude_modules" in {field.name for field in fields(LoraConfig)}
"""Whether this version of PEFT leaves layers out by itself."""


@dataclass
class _ExcludingLoraConfig(LoraConfig):
    exclude_modules: Any = None


def new_lora_config(**options: Any) -> LoraConfig:
    """`peft.LoraConfig` that has ``exclude_modules`` under every version."""
    return LoraConfig(**options) if EXCLUDES else _ExcludingLoraConfig(**options)


def add_lora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """`peft.get_peft_model`, with the layers that ``exclude_modules`` names left out under every version."""
    excluded = getattr(config, "exclude_modules", None)
    if EXCLUDES or not excluded:
        return get_peft_model(model, config)
    explicit: Any = copy.copy(config)
    names = [name for name, _ in model.named_modules() if _is_of(name, config.target_modules)]
    explicit.target_modules = {name for name in names if not _is_of(name, excluded)}
    wrapped = get_peft_model(model, explicit)
    wrapped.peft_config["default"] = config
    return wrapped


def _is_of(name: str, patterns: str | Iterable[str] | None) -> bool:
    """PEFT's rule: a string has to match the whole name, one of a list has to end it."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns or ())
