"""ddpo-pytorch, whose script looks its reward up by name in ``ddpo_pytorch.rewards``; and the like.

register(ddpo_pytorch.rewards, reward)     # then config.reward_fn = "latent_reward"
rewards = executor.submit(reward_fn, latents[:, -1], prompts, prompt_metadata)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dina_reward.integrations.scoring import as_tuple_reward


def register(rewards: Any, reward: Callable[..., Tensor], name: str = "latent_reward", **options: Any) -> None:
    """Makes ``rewards.NAME()`` a reward function ``fn(latents, prompts, metadata) -> (scores, {})``.

    Args:
        rewards: the client's module of rewards.
        reward: a `LatentReward` on the policy's pipeline.
        name: for the client's configuration.
        options: as for `as_tuple_reward`.
    """
    setattr(rewards, name, lambda: as_tuple_reward(reward, **options))
