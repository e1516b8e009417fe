"""Calls reward functions by keyword, checks what they return, and says which sample a fault belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from dina_reward.alignment.pictures import checked_images
from dina_reward.alignment.prompts import columns_of
from dina_reward.families import Conditioning


logger = logging.get_logger(__name__)

RewardFunction = Callable[..., Any]
"""Callable that takes some of the available keyword arguments and returns one number (or None) per row.

Three kinds: a `LatentReward`; any callable on ``latents``; a pixel reward, which names the argument ``images``.
"""

Decoder = Callable[[Tensor], Tensor]
"""``latents -> images``, shape ``(batch, 3, height, width)``, of videos ``(batch, frames, 3, height, width)``, in [0, 1]."""

_EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask")
_SCORE_OPTIONS = ("noise_level", "ensemble", "num_noise_samples", "seed")
_SHOWN_ROWS = 4


class RewardError(ValueError):
    """A reward function raised, or returned something else than one finite number or None per row.

    Args:
        message: names the function, the rows, their prompts and noise seeds.
        rows: the rows of the batch that have no score.
        scores (`Tensor`): what could be read, shape ``(batch,)``, float32, NaN in ``rows``.
    """

    def __init__(self, message: str, rows: Sequence[int], scores: Tensor) -> None:
        super().__init__(message)
        self.rows = list(rows)
        self.scores = scores


class _OptionalReward:
    def __init__(self, function: RewardFunction) -> None:
        self.__wrapped__ = function  # what `inspect.signature` follows
        self.__name__ = callable_name(function)
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


def optional_reward(function: RewardFunction) -> RewardFunction:
    """Marks a reward function whose failures must not stop the run, such as a call to a remote judge.

    Rows without a score then count as "does not apply", as if the function had returned None for them; `RewardSet` counts
    them and warns once. Name and signature stay those of ``function``.

    Example:
        >>> @optional_reward
        ... def remote_judge(images, prompts): ...
    """
    return _OptionalReward(function)


def callable_name(function: RewardFunction) -> str:
    """Name of a reward function in logs: that of the function, or of the class of a callable object."""
    return str(getattr(function, "__name__", type(function).__name__))


def unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    """Names of several functions; a repeated one gets a number."""
    names: list[str] = []
    for function in functions:
        name = callable_name(function)
        repeats = sum(other == name or other.startswith(f"{name}_") for other in names)
        names.append(f"{name}_{repeats + 1}" if repeats else name)
    return names


def takes_images(function: RewardFunction) -> bool:
    """Whether a function is a pixel reward: its signature names ``images`` (``**kwargs`` does not count)."""
    return "images" in _parameters(function)


def check_synchronous(function: RewardFunction) -> None:
    """Refuses coroutine functions.

    Raises:
        ValueError: the function is declared with ``async def``.
    """
    inner = _inner(function)
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(getattr(inner, "__call__", None)):  # noqa: B004
        raise ValueError(
            f"{callable_name(function)} is an async function; reward functions are called one after another, so declare "
            "it with `def` and run the coroutine inside: `return asyncio.run(...)`"
        )


def accepted_arguments(function: RewardFunction, available: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``available`` that a function takes by keyword.

    A function with ``**kwargs`` gets everything except ``images``, which must be named. Prompt embeddings go only to
    functions that require them: one that takes ``prompts`` encodes them itself, at its own sequence length.

    Raises:
        ValueError: the function requires an argument that is not available.
    """
    parameters = _parameters(function)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return {name: value for name, value in available.items() if name != "images" or name in parameters}
    arguments: dict[str, Any] = {}
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        required = parameter.default is parameter.empty
        if parameter.name in available and (required or parameter.name not in _EMBEDDINGS):
            arguments[parameter.name] = available[parameter.name]
        elif required:
            raise ValueError(
                f"{callable_name(function)} requires {parameter.name!r}, which is not available; "
                f"it can take {', '.join(sorted(available))}"
            )
    return arguments


def call_reward(function: RewardFunction, available: Mapping[str, Any], batch_size: int) -> Any:
    """Calls a function with what it takes of ``available``, without gradient, and returns what it returns.

    Raises:
        ValueError: the function requires an argument that is not available.
        RewardError: the function raised.
    """
    arguments = accepted_arguments(function, available)
    try:
        with torch.no_grad():
            return function(**arguments)
    except Exception as error:
        raise _raised(function, error, available, batch_size) from error


def call_scorer(function: RewardFunction, available: Mapping[str, Any], batch_size: int) -> Tensor:
    """Scores one batch.

    Returns:
        `Tensor` of shape ``(batch_size,)``, float32, on the CPU; NaN where the function returned None, which means that it
        does not apply to the row. None instead of all numbers means that it applies to no row.

    Raises:
        ValueError: the function requires an argument that is not available.
        RewardError: the function raised, or the result does not hold one finite number or None per row.
    """
    result = call_reward(function, available, batch_size)
    return checked_scores(callable_name(function), result, available, batch_size)


def checked_scores(name: str, result: Any, available: Mapping[str, Any], batch_size: int) -> Tensor:
    """Scores as a float32 CPU tensor, or a `RewardError` that names the function and the sample; see `call_scorer`."""
    nothing, everyone = torch.full((batch_size,), torch.nan), range(batch_size)
    if result is None:
        return nothing
    try:
        scores, applies = _read_scores(result)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"{name} returned {type(result).__name__}, which does not hold numbers: {error}"
        raise RewardError(f"{message} ({_samples(available, everyone)})", everyone, nothing) from error
    if scores.shape != (batch_size,):
        message = f"{name} returned shape {tuple(scores.shape)}; expected one number per row, ({batch_size},)"
        raise RewardError(f"{message} ({_samples(available, everyone)})", everyone, nothing)
    faulty = (~torch.isfinite(scores) & applies).nonzero().flatten().tolist()
    if faulty:
        message = (
            f"{name} returned {float(scores[faulty[0]])} for row {faulty[0]} of {batch_size}; rewards must be finite, and "
            f"None says that a reward does not apply ({_samples(available, faulty)})"
        )
        raise RewardError(message, faulty, scores.where(torch.isfinite(scores), torch.nan))
    return scores


def forgive(function: RewardFunction, name: str, error: RewardError, failures: dict[str, int]) -> Tensor:
    """What could be read of an optional function's result; counts the rows lost and warns once per function.

    Raises:
        RewardError: ``error``, if the function is not marked with `optional_reward`.
    """
    if not isinstance(function, _OptionalReward):
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
    name, target = callable_name(function), getattr(_inner(function), "score", None)
    if callable(target):
        offered = ("latents", "prompts", *_SCORE_OPTIONS)
        arguments = accepted_arguments(target, {key: available[key] for key in offered if key in available})
    else:
        if takes_images(function) and images is None:
            raise ValueError(f"{name} takes images; back-propagation through it needs a differentiable decoder")
        target, arguments = function, accepted_arguments(function, {**available, "images": images})
    try:
        with torch.enable_grad():
            result = target(**arguments)
    except Exception as error:
        raise _raised(function, error, available, batch_size) from error
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
    ``seed`` (one integer per row), ``noise_level``, ``ensemble``, ``num_noise_samples``, and the columns of the prompt
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
        ValueError: a function is async, or takes images without a decoder.
    """

    functions: Sequence[RewardFunction]
    settings: Mapping[str, Any]
    decode: Decoder | None = None
    failures: dict[str, int] = field(default_factory=dict, init=False)
    _announced: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for function in self.functions:
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
        """What functions may take, except ``images``; arguments as for `score`."""
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


def _inner(function: RewardFunction) -> RewardFunction:
    return function.__wrapped__ if isinstance(function, _OptionalReward) else function


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{callable_name(function)} has no readable signature, so its arguments are unknown; wrap it in a function "
            "that names them, such as `def reward(latents, prompts): ...`"
        ) from error


def _read_scores(result: Any) -> tuple[Tensor, Tensor]:
    """Numbers with NaN for None, and which entries are not None."""
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError("it must be awaited; reward functions are called synchronously")
    if isinstance(result, Tensor):
        scores = result.detach().to("cpu", torch.float32)
        return scores, torch.ones_like(scores, dtype=torch.bool)
    if isinstance(result, Sequence) and not isinstance(result, str):
        missing = [value is None for value in result]
        if any(missing):
            values = [float("nan") if absent else float(v) for v, absent in zip(result, missing, strict=True)]
            return torch.tensor(values, dtype=torch.float32), ~torch.tensor(missing)
    scores = torch.as_tensor(result, dtype=torch.float32).cpu()
    return scores, torch.ones_like(scores, dtype=torch.bool)


def _raised(function: RewardFunction, error: Exception, available: Mapping[str, Any], batch_size: int) -> RewardError:
    everyone = range(batch_size)
    message = f"{callable_name(function)} raised {type(error).__name__}: {error} ({_samples(available, everyone)})"
    return RewardError(message, everyone, torch.full((batch_size,), torch.nan))


def _samples(available: Mapping[str, Any], rows: Sequence[int]) -> str:
    """Identity of samples for error messages."""
    prompts, seeds = available.get("prompts"), available.get("seed")
    shown = [
        f"row {row}"
        + (f" prompt {prompts[row]!r}" if prompts is not None else "")
        + (f" noise seed {seeds[row]}" if seeds is not None else "")
        for row in rows[:_SHOWN_ROWS]
    ]
    more = len(rows) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")
