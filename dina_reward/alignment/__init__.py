"""Alignment of generators with rewards on their latents."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dina_reward.alignment.config import DiffusionGRPOConfig
    from dina_reward.alignment.trainer import DiffusionGRPOTrainer

_EXPORTS = {
    "DiffusionGRPOConfig": "dina_reward.alignment.config",
    "DiffusionGRPOTrainer": "dina_reward.alignment.trainer",
}

__all__ = ["DiffusionGRPOConfig", "DiffusionGRPOTrainer"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
