"""The reward network: configuration, backbone with LoRA, heads, encoding of prompts, and scoring of a noisy batch.

Nothing here reads or writes files, or knows where a backbone comes from. Begin at `model.LatentRewardModel`, then
`scoring.score_batch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.modeling.config import LatentRewardConfig, default_lora_config, default_reward_config
    from dina_reward.modeling.heads.config import RewardHeadConfig
    from dina_reward.modeling.inputs import NonFiniteError
    from dina_reward.modeling.model import LatentRewardModel
    from dina_reward.modeling.scoring import RewardOutput

__getattr__, __dir__, __all__ = lazy_exports(__name__)
