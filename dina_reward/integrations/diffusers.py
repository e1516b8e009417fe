"""diffusers: a ``callback_on_step_end`` that knows which timestep its latents are at.

    scores = ScoreCallback(reward, prompts)
    pipe(prompts, callback_on_step_end=scores)
    scores.history[3]                          # (batch,): after the fourth step
    scores.stop = lambda step, scores: step == 4 and scores.max() < 15    # ends a hopeless batch early

Training scripts that have modules and no pipeline load a reward from these, before they add their LoRA, and score what
they have encoded themselves:

    reward = LatentReward.from_pretrained(path, transformer=unet, scheduler=noise_scheduler, share_backbone=True)
    reward(latents, prompt_embeds=encoder_hidden_states)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from dina_reward.checks.values import checked_texts, is_int
from dina_reward.integrations.scoring import check_callable, prompt_seeds
from dina_reward.noise.draws import checked_seed


class ScoreCallback:
    """Scores the states of a diffusers pipeline while it samples.

    The callback of a step gets the state *after* it, which is at the next timestep of the scheduler, and after the last
    step clean; it is handed the timestep before.

    Args:
        reward: a `LatentReward` of the pipeline's family.
        prompts: one per image, or one for all.
        steps: after which steps to score, counted from 0. Default: all.
        stop: called with the step and its scores; true ends the sampling there, whose result is then a noisy latent.
        seed: of the noise that the clean latents at the end get; equal prompts see equal noise.
        options: further arguments of `LatentReward.score_noisy` and `score`: ``height`` and ``width``, embeddings.

    Attributes:
        history: scores, shape ``(batch,)``, float32, by step.
    """

    def __init__(
        self,
        reward: Any,
        prompts: str | Sequence[str] | None = None,
        *,
        steps: Collection[int] | None = None,
        stop: Callable[[int, Tensor], Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not hasattr(reward, "score_noisy") or isinstance(reward, type):
            raise ValueError(f"reward must be a LatentReward, which scores noisy states, got {reward!r:.80}")
        checked_seed(seed)
        if prompts is not None:
            checked_texts("prompts", prompts)
        listed = isinstance(steps, (Sequence, Set)) and not isinstance(steps, (str, bytes))
        if steps is not None and not (listed and all(is_int(step) for step in steps)):
            raise ValueError(f"steps must be a collection of integers, got {steps!r:.80}")
        if stop is not None:
            check_callable("stop", stop)
        self.reward = reward
        self.prompts = prompts
        self.steps = steps
        self.stop = stop
        self.seed = seed
        self.options = options
        self.history: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline calls; returns ``kwargs`` as they are.

        Raises:
            ValueError: the pipeline does not hand over latents, or the scheduler makes several calls per step.
        """
        if self.steps is not None and step not in self.steps:
            return kwargs
        if "latents" not in kwargs:
            raise ValueError("the callback has no latents: name them in callback_on_step_end_tensor_inputs")
        if getattr(pipe.scheduler, "order", 1) != 1:
            raise ValueError(
                f"{type(pipe.scheduler).__name__} takes several calls per step, between which states are at no timestep"
            )
        scores = self.history[step] = self._score(pipe.scheduler, step, kwargs["latents"])
        if self.stop is not None and bool(self.stop(step, scores)):
            pipe._interrupt = True
        return kwargs

    def _score(self, scheduler: Any, step: int, latents: Tensor) -> Tensor:
        timesteps = scheduler.timesteps
        if step + 1 < len(timesteps):
            at = timesteps[step + 1]
            scores: Tensor = self.reward.score_noisy(
                latents, self.prompts, timesteps=at, scheduler=scheduler, **self.options
            )
            return scores
        options = dict(self.options)
        if isinstance(self.prompts, str) or self.prompts is None:
            options |= {"seed": prompt_seeds([str(self.prompts)], self.seed)[0], "share_noise": True}
        else:
            options |= {"seed": prompt_seeds(self.prompts, self.seed)}
        clean: Tensor = self.reward(latents, self.prompts, **options)
        return clean
