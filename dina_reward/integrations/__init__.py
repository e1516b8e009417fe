"""The reward as other trainers call it: one short file per client, none of which imports its client when it is imported.

What a user adds to each is in README.md beside this file. Begin at `scoring.LatentScorer`, which all of them call:
prompts as the client has them become noise seeds, and scores are float32 whatever autocast surrounds the call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.integrations.ddpo_pytorch import register
    from dina_reward.integrations.diffusers import ScoreCallback
    from dina_reward.integrations.flow_grpo import multi_score_with
    from dina_reward.integrations.miles import batched_reward
    from dina_reward.integrations.scoring import LatentScorer, as_tuple_reward, prompt_seeds
    from dina_reward.integrations.single_rows import MicroBatcher
    from dina_reward.integrations.trl import LatentOutput, as_trl_reward, decoded

__getattr__, __dir__, __all__ = lazy_exports(__name__)
