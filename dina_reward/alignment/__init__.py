"""Alignment of generators with rewards on their latents: sampling, experience, objectives, monitoring, trainers.

No reward is defined or trained here, and training never decodes unless a reward asks for images. Begin at
`trainers.base.AlignmentTrainer`, then `trainers.grpo.DiffusionGRPOTrainer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.alignment.config import AlignmentConfig
    from dina_reward.alignment.experience.null_reward import null_reward
    from dina_reward.alignment.monitoring.best_policy import BestPolicyCallback
    from dina_reward.alignment.monitoring.hacking import RewardHackingCallback
    from dina_reward.alignment.monitoring.tightening import TightenOnAlarm
    from dina_reward.alignment.trainers.backprop import RewardBackpropConfig, RewardBackpropTrainer
    from dina_reward.alignment.trainers.base import AlignmentTrainer
    from dina_reward.alignment.trainers.grpo import DDPOTrainer, DiffusionGRPOTrainer
    from dina_reward.alignment.trainers.grpo_config import DDPOConfig, DiffusionGRPOConfig
    from dina_reward.alignment.trainers.nft import DiffusionNFTConfig, DiffusionNFTTrainer
    from dina_reward.alignment.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from dina_reward.reward_functions import optional_reward

__getattr__, __dir__, __all__ = lazy_exports(__name__)
