"""Latent rewards for diffusion and flow-matching models.

Public names load on first use, so that ``import dina_reward`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from dina_reward.alignment import DiffusionGRPOConfig, DiffusionGRPOTrainer
    from dina_reward.checkpoint import CheckpointError, convert_checkpoint
    from dina_reward.evaluation import evaluate_preferences
    from dina_reward.inputs import NonFiniteError
    from dina_reward.modeling import LatentRewardConfig, LatentRewardModel, default_lora_config
    from dina_reward.reward import LatentReward
    from dina_reward.scoring import RewardOutput
    from dina_reward.sharing import SharedBackboneError
    from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig

__version__ = "0.1.0"

_EXPORTS = {
    "CheckpointError": "dina_reward.checkpoint",
    "DiffusionGRPOConfig": "dina_reward.alignment",
    "DiffusionGRPOTrainer": "dina_reward.alignment",
    "LatentReward": "dina_reward.reward",
    "LatentRewardConfig": "dina_reward.modeling",
    "LatentRewardModel": "dina_reward.modeling",
    "LatentRewardTrainer": "dina_reward.training",
    "LatentRewardTrainingConfig": "dina_reward.training",
    "NonFiniteError": "dina_reward.inputs",
    "RewardOutput": "dina_reward.scoring",
    "SharedBackboneError": "dina_reward.sharing",
    "convert_checkpoint": "dina_reward.checkpoint",
    "default_lora_config": "dina_reward.modeling",
    "evaluate_preferences": "dina_reward.evaluation",
}

__all__ = [
    "CheckpointError",
    "DiffusionGRPOConfig",
    "DiffusionGRPOTrainer",
    "LatentReward",
    "LatentRewardConfig",
    "LatentRewardModel",
    "LatentRewardTrainer",
    "LatentRewardTrainingConfig",
    "NonFiniteError",
    "RewardOutput",
    "SharedBackboneError",
    "__version__",
    "convert_checkpoint",
    "default_lora_config",
    "evaluate_preferences",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dina_reward' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
