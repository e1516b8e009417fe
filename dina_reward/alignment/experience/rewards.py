"""The reward functions of a run: what they are told besides the samples, and whose failures are forgiven."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from dina_reward.alignment.experience.images import checked_images
from dina_reward.alignment.sampling.prompts import columns_of
from dina_reward.checks.values import check_numbers_list
from dina_reward.families import Conditioning
from dina_reward.reward import LatentReward
from dina_reward.reward_functions import (
    OptionalReward,
    RewardError,
    RewardFunction,
    accepted_arguments,
    call_scorer,
    callable_name,
    check_synchronous,
    checked_scores,
    own_copies,
    raised,
    reward_list,
    takes_images,
    unique_names,
    unwrapped,
)


logger = logging.get_logger(__name__)


Decoder = Callable[[Tensor], Tensor]
"""``latents -> images``, shape ``(batch, 3, height, width)``, of videos ``(batch, frames, 3, height, width)``, in [0, 1]."""

_SCORE_OPTIONS = ("noise_level", "ensemble", "num_noise_samples", "kappa", "spread", "seed")
_SAMPLES = ("latents", "images", "prompts", "prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask")


def is_latent_reward(function: RewardFunction) -> bool:
    """Whether it is a `LatentReward`, or stands for one elsewhere, whose ``weights_digest`` it then knows."""
    return isinstance(function, LatentReward) or hasattr(function, "weights_digest")


def check_columns(columns: Iterable[str], functions: Sequence[RewardFunction]) -> None:
    """Refuses columns of the prompt dataset that share a name with something else that functions are told.

    Raises:
        ValueError: naming the column, and the argument or option that it would stand for.
    """
    columns = set(columns)
    options = dict.fromkeys((*_SAMPLES, *_SCORE_OPTIONS), "an argument that every reward function is told")
    for function in functions:
        if is_latent_reward(unwrapped(function)):
            settings = set(inspect.signature(unwrapped(function)).parameters) - {"self", *options}
            options |= dict.fromkeys(settings, f"an option of {callable_name(function)}")
    clashes = sorted(columns & options.keys())
    if clashes:
        raise ValueError(
            f"the prompt dataset has a column {clashes[0]!r}, which is also {options[clashes[0]]}, so data would be taken "
            "for a setting (or the other way round); rename the column"
        )


def forgive(function: RewardFunction, name: str, error: RewardError, failures: dict[str, int]) -> Tensor:
    """What could be read of an optional function's result; counts the rows lost and warns once per function.

    Raises:
        RewardError: ``error``, if the function is not marked with `optional_reward`.
    """
    if not isinstance(function, OptionalReward):
        raise error
    if name not in failures:
        logger.warning(f"Optional reward: {error}. Such rows count as not applicable; this is said once.")
    failures[name] = failures.get(name, 0) + len(error.rows)
    return error.scores


def differentiable_score(
    function: RewardFunction, available: Mapping[str, Any], batch_size: int, *, images: Tensor | None = None
) -> Tensor:
    """Scores one batch with the graph back to ``available["latents"]``, for reward back-propagation.

    An object with a ``score`` method, such as `LatentReward`, is scored with it; any other callable is called with
    gradients on.

    Args:
        function: the reward; it must give a number for every row.
        available: arguments as made by `RewardSet.arguments`.
        batch_size: rows of ``available["latents"]``.
        images (`Tensor`, *optional*): the latents decoded with gradient, for a reward that takes ``images``.

    Returns:
        `Tensor` of shape ``(batch_size,)``, float32, with a graph.

    Raises:
        ValueError: the function needs images and gets none, or its result does not depend differentiably on the latents.
        RewardError: the function raised, or a score is missing or not finite.
    """
    check_synchronous(function)
    name, target = callable_name(function), getattr(unwrapped(function), "score", None)
    if callable(target) and not isinstance(target, nn.Module):  # which would be a layer called "score"
        offered = ("latents", "prompts", *_SCORE_OPTIONS)
        arguments = accepted_arguments(target, {key: available[key] for key in offered if key in available})
    else:
        if takes_images(function) and images is None:
            raise ValueError(f"{name} takes images; back-propagation through it needs a differentiable decoder")
        target, arguments = function, accepted_arguments(function, {**available, "images": images})
    try:
        with torch.enable_grad():
            result = target(**own_copies(arguments))
    except Exception as error:
        raise raised(function, error, available, batch_size) from error
    scores = getattr(result, "scores", result)
    checked_scores(name, scores, available, batch_size)
    if not isinstance(scores, Tensor) or not scores.requires_grad:
        raise ValueError(
            f"{name} returned scores without a gradient; a reward to back-propagate through must give one tensor computed "
            "from `latents` with differentiable torch operations, outside torch.no_grad()"
        )
    return scores.float()


@dataclass(frozen=True)
class RewardSet:
    """The reward functions of a run with what they are told besides the samples.

    Every function is called by keyword with those of these arguments that its signature names: ``latents``, ``prompts``,
    ``images``, ``prompt_embeds``, ``pooled_prompt_embeds``, ``prompt_embeds_mask`` (None where the family has none),
    ``seed`` (one integer per row), ``noise_level``, ``ensemble``, ``num_noise_samples``, with conservative scoring ``kappa``
    and ``spread``, and the columns of the prompt
    dataset. A `LatentReward` fits as it is. Latents are in the spatial layout of the family, and decoded, once per batch,
    only if a function names ``images``.

    A function returns one finite number per row, or None for rows (or all) that it does not apply to. Anything else stops
    the run with a `RewardError`, unless the function is marked with `optional_reward`.

    Args:
        functions: the callables.
        settings: arguments that are the same for all rows (``noise_level`` and so on).
        decode (`Decoder`, *optional*): needed if a function takes ``images``.
        failures (`dict[str, int]`): rows that optional functions have failed on so far, by function name.

    Raises:
        ValueError: a function is async or cannot be called, or takes images without a decoder.
    """

    functions: Sequence[RewardFunction]
    settings: Mapping[str, Any]
    decode: Decoder | None = None
    failures: dict[str, int] = field(default_factory=dict, init=False)
    _announced: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for function in reward_list(list(self.functions), "functions"):
            check_synchronous(function)
            if self.decode is None and takes_images(function):
                raise ValueError(
                    f"{callable_name(function)} takes images, but there is no decoder here; pass decode=, or score latents"
                )

    @property
    def names(self) -> list[str]:
        """One name per function, for logs."""
        return unique_names(self.functions)

    @property
    def needs_images(self) -> bool:
        """Whether some function takes ``images``, so that latents are decoded."""
        return any(takes_images(function) for function in self.functions)

    def score(
        self,
        latents: Tensor,
        rows: Sequence[Mapping[str, Any]],
        conditioning: Conditioning,
        seeds: Sequence[int],
        *,
        images: Tensor | None = None,
    ) -> Tensor:
        """Scores clean latents.

        Args:
            latents (`Tensor`): shape ``(batch, ...)``.
            rows: dataset row of each latent.
            conditioning: encoded prompts, one row per latent.
            seeds: noise seed of each latent.
            images (`Tensor`, *optional*): the decoded latents, where they are at hand already.

        Returns:
            `Tensor` of shape ``(batch, functions)``, float32, on the CPU; NaN where a function does not apply.

        Raises:
            RewardError: a function that is not optional failed.
            ValueError: a function requires an argument that is not available, or the decoder returns no images.
        """
        available = self.arguments(latents, rows, conditioning, seeds)
        if self.needs_images:
            available["images"] = self._decoded(latents) if images is None else images
        pairs = zip(self.names, self.functions, strict=True)
        return torch.stack([self._column(name, function, available, len(rows)) for name, function in pairs], dim=1)

    def arguments(
        self, latents: Tensor, rows: Sequence[Mapping[str, Any]], conditioning: Conditioning, seeds: Sequence[int]
    ) -> dict[str, Any]:
        """What functions may take, except ``images``; arguments as for `score`.

        Raises:
            ValueError: a column shares its name with another argument; see `check_columns`.
        """
        check_columns({name for row in rows for name in row} - {"prompt"}, self.functions)
        return {
            **columns_of(rows),
            **self.settings,
            "latents": latents,
            "prompt_embeds": conditioning.prompt_embeds,
            "pooled_prompt_embeds": conditioning.pooled_prompt_embeds,
            "prompt_embeds_mask": conditioning.prompt_embeds_mask,
            "seed": list(seeds),
        }

    def _column(self, name: str, function: RewardFunction, available: Mapping[str, Any], batch_size: int) -> Tensor:
        try:
            return call_scorer(function, available, batch_size)
        except RewardError as error:
            return forgive(function, name, error, self.failures)

    def _decoded(self, latents: Tensor) -> Tensor:
        if not self._announced:
            self._announced.extend(name for name, f in zip(self.names, self.functions, strict=True) if takes_images(f))
            logger.warning(f"Latents are decoded for every batch, because of images in: {', '.join(self._announced)}.")
        assert self.decode is not None
        with torch.no_grad():
            return checked_images(self.decode(latents), latents.shape[0])


def checked_reward_weights(weights: Sequence[float] | None, functions: int) -> list[float]:
    """One weight per reward function, 1 by default.

    Raises:
        ValueError: no functions, another number of weights, or weights that are no numbers.
    """
    if functions == 0:
        raise ValueError("reward_funcs is empty; give at least one callable")
    if weights is None:
        return [1.0] * functions
    check_numbers_list("reward_weights", weights)
    if len(weights) != functions:
        raise ValueError(f"reward_weights has {len(weights)} entries for {functions} reward functions; give one each")
    return list(weights)
