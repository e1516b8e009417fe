"""Latent rewards for diffusion and flow-matching models.

Public names load on first use, so that ``import dina_reward`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.alignment import DiffusionGRPOConfig, DiffusionGRPOTrainer
    from dina_reward.backbones.sharing import SharedBackboneError
    from dina_reward.checkpoints import CheckpointError, convert_checkpoint
    from dina_reward.evaluation import evaluate_preferences
    from dina_reward.modeling import LatentRewardConfig, LatentRewardModel, default_lora_config, default_reward_config
    from dina_reward.modeling.inputs import NonFiniteError
    from dina_reward.modeling.scoring import RewardOutput
    from dina_reward.reward import LatentReward
    from dina_reward.serving.remote import RemoteReward
    from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_exports(__name__)
__all__ += ["__version__"]
