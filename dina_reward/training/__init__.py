"""Training a latent reward on preferences."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dina_reward.training.checkpointing import AtomicCheckpointMixin, CheckpointedCallback
    from dina_reward.training.config import LatentRewardTrainingConfig
    from dina_reward.training.ema import EMACallback
    from dina_reward.training.trainer import LatentRewardTrainer

_MODULES = {
    "AtomicCheckpointMixin": "checkpointing",
    "CheckpointedCallback": "checkpointing",
    "EMACallback": "ema",
    "LatentRewardTrainer": "trainer",
    "LatentRewardTrainingConfig": "config",
}

__all__ = [
    "AtomicCheckpointMixin",
    "CheckpointedCallback",
    "EMACallback",
    "LatentRewardTrainer",
    "LatentRewardTrainingConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
