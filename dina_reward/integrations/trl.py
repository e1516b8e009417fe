"""TRL up to 0.23: `DDPOTrainer` and `AlignPropTrainer`, whose reward functions get what the pipeline wrapper returns.

from dina_reward.integrations import LatentOutput, as_trl_reward, decoded

class Pipeline(LatentOutput, DefaultDDPOStableDiffusionPipeline): ...
pipeline = Pipeline("path/or/id")
reward = LatentReward.from_pretrained(path, pipeline=pipeline.sd_pipeline, share_backbone=True)
trainer = DDPOTrainer(config, as_trl_reward(reward), prompt_fn, pipeline, decoded(pipeline, image_samples_hook))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.checks.values import check_flags
from dina_reward.families import family_of
from dina_reward.integrations.scoring import LatentScorer


class LatentOutput:
    """Mixin in front of a `DDPOStableDiffusionPipeline`: it returns latents, whatever the trainer asks for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Samples; ``images`` of the output are scaled latents."""
        return super().__call__(*args, **{**kwargs, "output_type": "latent"})  # type: ignore[misc]

    def rgb_with_grad(self, *args: Any, **kwargs: Any) -> Any:
        """Samples with the graph of `AlignPropTrainer`; ``images`` of the output are scaled latents."""
        return super().rgb_with_grad(*args, **{**kwargs, "output_type": "latent"})  # type: ignore[misc]


def as_trl_reward(
    reward: Callable[..., Tensor], *, differentiable: bool = False, seed: int = 0, **options: Any
) -> Callable[[Tensor, Sequence[str], Sequence[Any]], tuple[Tensor, dict[str, Any]]]:
    """The reward function of both trainers: ``fn(latents, prompts, metadata) -> (scores, {})``.

    Args:
        reward: a `LatentReward` on the policy's pipeline.
        differentiable: for `AlignPropTrainer`: scores carry the graph to the latents.
        seed: equal prompts see equal noise, which depends on it.
        options: further arguments of `LatentReward.score`.
    """
    check_flags(differentiable=differentiable)
    scorer = LatentScorer(reward, seed, options=options)
    score = scorer.differentiable if differentiable else scorer.__call__

    def latent_reward(images: Tensor, prompts: Sequence[str], metadata: Any = None) -> tuple[Tensor, dict[str, Any]]:
        return score(images, prompts), {}

    return latent_reward


def decoded(pipeline: Any, hook: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """An ``image_samples_hook`` that gets pictures in [0, 1] instead of latents; only what the hook gets is decoded.

    Args:
        pipeline: the trainer's wrapper, with the diffusers pipeline as ``sd_pipeline``.
        hook: of either trainer.
    """
    inner = pipeline.sd_pipeline
    family = family_of(inner)

    @torch.no_grad()
    def decode_and_call(data: Any, step: Any, tracker: Any) -> Any:
        if isinstance(data, dict):
            data = {**data, "images": family.decode_latents(inner, data["images"])}
        else:
            data = [[family.decode_latents(inner, batch[0]), *batch[1:]] for batch in data]
        return hook(data, step, tracker)

    return decode_and_call
