"""Alignment of generators with rewards on their latents: samplers with log-probabilities, experience, objectives, trainers.

No reward is defined or trained here, and training never decodes unless a reward asks for images. Begin at
`base.AlignmentTrainer`, then `trainer.DiffusionGRPOTrainer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.alignment.backprop import RewardBackpropConfig, RewardBackpropTrainer
    from dina_reward.alignment.base import AlignmentTrainer
    from dina_reward.alignment.config import AlignmentConfig
    from dina_reward.alignment.grpo_config import DDPOConfig, DiffusionGRPOConfig
    from dina_reward.alignment.hacking import RewardHackingCallback
    from dina_reward.alignment.nft import DiffusionNFTConfig, DiffusionNFTTrainer
    from dina_reward.alignment.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from dina_reward.alignment.trainer import DDPOTrainer, DiffusionGRPOTrainer
    from dina_reward.reward_functions import optional_reward

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "backprop": ("RewardBackpropConfig", "RewardBackpropTrainer"),
        "base": ("AlignmentTrainer",),
        "config": ("AlignmentConfig",),
        "grpo_config": ("DDPOConfig", "DiffusionGRPOConfig"),
        "hacking": ("RewardHackingCallback",),
        "nft": ("DiffusionNFTConfig", "DiffusionNFTTrainer"),
        "online_dpo": ("OnlineDPOConfig", "OnlineDPOTrainer"),
        ".reward_functions": ("optional_reward",),
        "trainer": ("DDPOTrainer", "DiffusionGRPOTrainer"),
    },
)
