"""Training of a latent reward on preferences: trainer, configuration, moving average, sharding, checkpoints that resume.

Generators are not trained here, and data is not read here. Begin at `trainer.LatentRewardTrainer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.training.checkpointing import AtomicCheckpointMixin, CheckpointedCallback
    from dina_reward.training.config import LatentRewardTrainingConfig
    from dina_reward.training.ema import EMACallback
    from dina_reward.training.trainer import LatentRewardTrainer

__getattr__, __dir__, __all__ = lazy_exports(__name__)
