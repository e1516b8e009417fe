"""Alignment of generators with rewards on their latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.alignment.config import DiffusionGRPOConfig
    from dina_reward.alignment.trainer import DiffusionGRPOTrainer

_MODULES = {
    "DiffusionGRPOConfig": "config",
    "DiffusionGRPOTrainer": "trainer",
}

__all__ = ["DiffusionGRPOConfig", "DiffusionGRPOTrainer"]

__getattr__, __dir__ = lazy_exports(__name__, _MODULES)
