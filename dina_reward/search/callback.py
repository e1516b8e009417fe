"""Early selection inside a pipeline's own call: a ``callback_on_step_end`` that scores states and gives up the worse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.costs import CallCounter
from dina_reward.alignment.experience.rewards import checked_reward_weights
from dina_reward.checks.values import checked_texts
from dina_reward.reward import LatentReward
from dina_reward.reward_functions import callable_name, reward_list
from dina_reward.search.best_of_n import Halving
from dina_reward.search.method import checkpoints
from dina_reward.search.particles import NO_PARENT, Check, rows_of


ROW_TENSORS = {
    "StableDiffusionPipeline": ("prompt_embeds",),
    "StableDiffusionXLPipeline": ("prompt_embeds", "add_text_embeds", "add_time_ids"),
    "StableDiffusion3Pipeline": ("prompt_embeds", "pooled_prompt_embeds"),
}
"""Pipelines whose callback may change everything that has one row per sample, with what that is besides the latents."""

_MEMORIES = ("model_outputs", "ets", "prev_derivative", "derivatives")


class SearchCallback:
    """Successive halving for people who keep their own pipeline call.

    After some steps it scores the states, at the level of the *next* timestep, and keeps the better ones of each prompt.
    Where the pipeline allows it (SD 1.x and 2.x, SDXL, SD3; schedulers without memory of earlier steps) the batch shrinks,
    so that what is given up costs nothing more; elsewhere all rows go on, and the callback only says which it would keep.

    Examples:
        >>> prompts = ["a cat"] * 8
        >>> callback = SearchCallback(reward, prompts)
        >>> latents = pipe(
        ...     prompts,
        ...     output_type="latent",
        ...     callback_on_step_end=callback,
        ...     callback_on_step_end_tensor_inputs=callback.tensor_inputs(pipe),
        ... ).images
        >>> latents = callback.select(latents)  # the best of each prompt, whether the batch has shrunk or not

    Args:
        reward: a `LatentReward`, or several; other callables cannot score a noisy state.
        prompts: one per row of the pipeline's batch, equal ones for rows that compete.
        checks, survivors: as of `Halving`.
        keep: rows per prompt that are never given up.
        reward_weights: one per reward; all 1 by default.
        height, width: in pixels, for packed latents that are not square.
        shrink: whether rows that are given up leave the batch; by default where that is possible.

    Raises:
        ValueError: a reward cannot score states, settings do not fit, or later: another number of rows than prompts, or
            a batch that cannot shrink as asked.
    """

    def __init__(
        self,
        reward: LatentReward | Sequence[LatentReward],
        prompts: Sequence[str],
        *,
        checks: tuple[float, ...] = Halving.checks,
        survivors: float = Halving.survivors,
        keep: int = 1,
        reward_weights: Sequence[float] | None = None,
        height: int | None = None,
        width: int | None = None,
        shrink: bool | None = None,
    ) -> None:
        self.settings = Halving(checks=checks, survivors=survivors)
        self.rewards: list[LatentReward] = []
        for function in reward_list(reward, "reward"):
            if not isinstance(function, LatentReward):
                raise ValueError(
                    f"{callable_name(function)} cannot score a noisy state, and a pipeline's callback sees nothing else; "
                    "give a LatentReward here, or use `search`, which predicts clean latents for other callables"
                )
            self.rewards.append(function)
        self.weights = checked_reward_weights(reward_weights, len(self.rewards))
        self.prompts = checked_texts("prompts", prompts)
        self.keep = keep
        self.size: dict[str, Any] = {"height": height, "width": width}
        self.shrink = shrink
        self.calls = CallCounter()
        self.reset()

    def reset(self) -> None:
        """Forgets the last call of the pipeline, before another one; the first step of a call does so by itself."""
        self.rows = list(range(len(self.prompts)))
        """Rows of the pipeline's batch that are still in the running, in order."""
        self.trace: list[Check] = []
        self._inside = list(self.rows)
        self._node = [NO_PARENT] * len(self.rows)

    def tensor_inputs(self, pipeline: Any) -> list[str]:
        """What to pass as ``callback_on_step_end_tensor_inputs``."""
        return ["latents", *(ROW_TENSORS.get(type(pipeline).__name__, ()) if self._can_shrink(pipeline) else ())]

    def __call__(self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """See `diffusers.callbacks.PipelineCallback`."""
        if step == 0:
            self.reset()
        latents, steps = callback_kwargs["latents"], int(pipeline.num_timesteps)
        self._check_rows(latents)
        evaluations = 2 if getattr(pipeline, "do_classifier_free_guidance", False) else 1
        with torch.no_grad():
            self.calls.count_denoiser(len(latents), evaluations)
        if step + 1 not in checkpoints(self.settings.checks, steps):
            return callback_kwargs
        grid = pipeline.scheduler.timesteps
        scores = self._scores(latents, pipeline, grid[len(grid) - steps + step + 1])
        kept = self._kept(scores)
        self._note(step + 1, scores, kept)
        self.rows = [self.rows[place] for place in kept]
        if not self._can_shrink(pipeline):
            return callback_kwargs
        self._inside = list(self.rows)
        return {
            name: value if value is None else _rows_taken(value, kept, len(scores))
            for name, value in callback_kwargs.items()
        }

    def select(self, latents: Tensor, seed: int = 0) -> Tensor:
        """The best clean latents of each prompt, `keep` of them, of those that are still in the running.

        Args:
            latents: what the pipeline returned for ``output_type="latent"``.
            seed: of the reward's own noise.

        Returns:
            `Tensor`: shape ``(prompts * keep, ...)``, prompts in order of appearance, the best of each first.
        """
        self._check_rows(latents)
        latents = latents[[self._inside.index(row) for row in self.rows]]
        texts = self._texts(self.rows)
        self.calls.count_rewards(len(latents))
        numbers = self._numbers(self.rows)
        columns = [
            weight * reward(latents, texts, seed=[seed + number for number in numbers], **self.size).cpu()
            for weight, reward in zip(self.weights, self.rewards, strict=True)
        ]
        scores = torch.stack(columns).sum(dim=0)
        order = [
            rows[place]
            for rows in rows_of(numbers).values()
            for place in scores[rows].argsort(descending=True, stable=True)[: self.keep].tolist()
        ]
        return latents[order]

    def _can_shrink(self, pipeline: Any) -> bool:
        reason = None
        if type(pipeline).__name__ not in ROW_TENSORS:
            reason = f"{type(pipeline).__name__} keeps rows that its callback cannot change"
        memories = [name for name in _MEMORIES if hasattr(pipeline.scheduler, name)]
        if memories:
            reason = f"{type(pipeline.scheduler).__name__} remembers the rows of earlier steps ({memories[0]})"
        if reason and self.shrink:
            raise ValueError(f"the batch cannot shrink: {reason}; leave shrink away, or use `search`")
        return reason is None and self.shrink is not False

    def _check_rows(self, latents: Tensor) -> None:
        if len(latents) != len(self._inside):
            raise ValueError(
                f"the pipeline has {len(latents)} rows and {len(self._inside)} are expected of {len(self.prompts)} prompts; "
                "give one prompt per row (num_images_per_prompt repeats each prompt)"
            )

    def _scores(self, latents: Tensor, pipeline: Any, timestep: Tensor) -> Tensor:
        """Of the rows in the running."""
        states = latents[[self._inside.index(row) for row in self.rows]]
        texts = self._texts(self.rows)
        self.calls.count_rewards(len(states))
        options = {"timesteps": float(timestep), "scheduler": pipeline.scheduler, **self.size}
        with torch.no_grad():
            columns = [
                weight * reward.score_noisy(states, texts, **options).cpu()
                for weight, reward in zip(self.weights, self.rewards, strict=True)
            ]
        self._level = float(self.rewards[0].noise_process.from_timesteps(float(timestep)).level)
        return torch.stack(columns).sum(dim=0)

    def _kept(self, scores: Tensor) -> list[int]:
        kept = []
        for places in rows_of(self._numbers(self.rows)).values():
            count = max(self.keep, math.ceil(len(places) * self.settings.survivors))
            order = scores[places].argsort(descending=True, stable=True)[:count].tolist()
            kept += [places[place] for place in order]
        return sorted(kept)

    def _note(self, step: int, scores: Tensor, kept: list[int]) -> None:
        first = self.trace[-1].nodes.stop if self.trace else 0
        check = Check(first, step, self._level, self._numbers(self.rows), self._node, scores, kept)
        self.trace.append(check)
        self._node = [check.first + place for place in kept]

    def _texts(self, rows: Sequence[int]) -> list[str]:
        return [self.prompts[row] for row in rows]

    def _numbers(self, rows: Sequence[int]) -> list[int]:
        """Number of the prompt of each row, in order of appearance."""
        place = {text: number for number, text in enumerate(dict.fromkeys(self.prompts))}
        return [place[self.prompts[row]] for row in rows]


def _rows_taken(values: Tensor, kept: Sequence[int], rows: int) -> Tensor:
    """Some rows, of both halves where a tensor has a negative and a positive one for every sample."""
    halves = len(values) // rows
    return values[[half * rows + row for half in range(halves) for row in kept]]
