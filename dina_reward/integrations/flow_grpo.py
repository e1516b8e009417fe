"""flow_grpo, DiffusionNFT and the trees that were made from them: a `multi_score` that takes the clean latents.

Their scripts hand pictures to the reward. Two edits hand over the latents, which their samplers return anyway:

    reward_fn = eval_reward_fn = multi_score_with(reward, config.reward_fn, multi_score, accelerator.device)
    rewards = executor.submit(reward_fn, images, prompts, prompt_metadata, latents=latents[:, -1])

In ``config.reward_fn`` the latent reward is called ``latent_reward``: ``{"latent_reward": 1.0, "pickscore": 0.5}``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.checks.values import check_kind, check_number
from dina_reward.integrations.scoring import LatentScorer, check_callable


NAME = "latent_reward"
"""What the latent reward is called among the rewards of a run."""


def multi_score_with(
    reward: Callable[..., Tensor],
    weights: Mapping[str, float] | None = None,
    pixel_multi_score: Callable[..., Any] | None = None,
    device: Any = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """What `flow_grpo.rewards.multi_score` returns, with the latent reward among its rewards.

    The function may be called from the client's thread pool. Where a call has no ``latents=``, as in evaluations, the
    pictures are encoded by the reward's pipeline.

    Args:
        reward: a `LatentReward`.
        weights: of all rewards by name; ours is ``latent_reward``. Default: ours alone.
        pixel_multi_score: the client's `multi_score`, which makes the other rewards; needed where there are any.
        device: for the other rewards.
        seed: equal prompts see equal noise, which depends on it.
        options: further arguments of `LatentReward.score`; ``height`` and ``width`` for packed latents.

    Returns:
        ``fn(images, prompts, metadata, ref_images=None, only_strict=True, *, latents=None) -> (scores, {})``; the scores of
        each reward and their weighted sum ``"avg"`` are lists of floats.

    Raises:
        ValueError: a weight is no number, there is none for the latent reward, or other rewards and nothing that makes them.
    """
    weights = {NAME: 1.0} if weights is None else weights
    check_kind("weights", weights, Mapping)
    for name, weight in weights.items():
        check_number(f"the weight of {name!r}", weight, -math.inf)
    if pixel_multi_score is not None:
        check_callable("pixel_multi_score", pixel_multi_score)
    if NAME not in weights:
        raise ValueError(f"weights must have an entry {NAME!r} for the latent reward, got {sorted(weights)}")
    others = {name: weight for name, weight in weights.items() if name != NAME}
    if others and pixel_multi_score is None:
        raise ValueError(f"pass the client's multi_score as `pixel_multi_score` for {sorted(others)}")
    pixel_scores = pixel_multi_score(device, others) if others and pixel_multi_score is not None else None
    scorer = LatentScorer(reward, seed, options=options)

    def fn(
        images: Any, prompts: Sequence[str], metadata: Any, *rest: Any, latents: Tensor | None = None, **named: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        scores: dict[str, Any] = {}
        if pixel_scores is not None:
            scores = dict(pixel_scores(images, prompts, metadata, *rest, **named)[0])
        ours = scorer(scorer.encode(images) if latents is None else latents, prompts).tolist()
        total = torch.tensor(ours, dtype=torch.float64) * weights[NAME]
        if "avg" in scores:
            total = total + torch.as_tensor([float(score) for score in scores["avg"]], dtype=torch.float64)
        return {**scores, NAME: ours, "avg": total.tolist()}, {}

    return fn
