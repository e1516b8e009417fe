"""Calls any function as a reward: by keyword, with what it takes, checking what it returns; faults name the sample."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward.backbones.wrappers import innermost


RewardFunction = Callable[..., Any]
"""Callable that takes some of the available keyword arguments and returns one number (or None) per row.

Three kinds: a `LatentReward`; any callable on ``latents``; a pixel reward, which names the argument ``images``.
"""

_EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds", "prompt_embeds_mask")
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


class OptionalReward:
    """A reward function that is allowed to fail; see `optional_reward`."""

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

    Examples:
        >>> @optional_reward
        ... def remote_judge(images, prompts): ...
    """
    return OptionalReward(function)


def callable_name(function: RewardFunction) -> str:
    """Name of a reward function in logs: that of the function, or of the class of a callable object."""
    name = getattr(function, "__name__", None) or getattr(function, "original_name", None)  # the latter of TorchScript
    return str(name or type(function).__name__)


def reward_list(functions: Any, what: str) -> list[RewardFunction]:
    """One function, or a list of them, as a list.

    Args:
        what: name of the argument, for messages.

    Raises:
        ValueError: something else, or something in the list that cannot be called.
    """
    given = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    for function in given:
        if not callable(function) or isinstance(function, type):
            kind = "a class; make an object of it" if isinstance(function, type) else type(function).__name__
            raise ValueError(f"{what} must be one function or a list of functions, got {function!r:.80} ({kind})")
    return given


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


def parameter_names(function: RewardFunction) -> set[str]:
    """Names of the arguments that a function's signature names; ``*args`` and ``**kwargs`` name none.

    Raises:
        ValueError: it has no readable signature.
    """
    parameters = _parameters(function).values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def check_synchronous(function: RewardFunction) -> None:
    """Refuses coroutine functions.

    Raises:
        ValueError: the function is declared with ``async def``.
    """
    inner = unwrapped(function)
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


def own_copies(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of arguments, also of each row's, so that a function that changes them in place harms no other.

    Tensors stay in their graph.
    """
    return {name: _own(value) for name, value in arguments.items()}


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list):
        # Each on its own: members of a group share one row.
        return [_own(item) for item in value]
    try:
        return copy.deepcopy(value)
    except Exception:  # a column may hold anything, also what cannot be copied
        return value


def call_reward(function: RewardFunction, available: Mapping[str, Any], batch_size: int) -> Any:
    """Calls a function with copies of what it takes of ``available``, without gradient, and returns what it returns.

    Raises:
        ValueError: the function requires an argument that is not available.
        RewardError: the function raised.
    """
    arguments = own_copies(accepted_arguments(function, available))
    try:
        with torch.no_grad():
            return function(**arguments)
    except Exception as error:
        raise raised(function, error, available, batch_size) from error


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
        scores = _in_float32(scores)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"{name} returned {type(result).__name__}, which does not hold one number per row: {error}"
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


def unwrapped(function: RewardFunction) -> RewardFunction:
    """The function inside `optional_reward`, or the function itself."""
    return function.__wrapped__ if isinstance(function, OptionalReward) else function


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    try:
        return _signature(unwrapped(function)).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{callable_name(function)} has no readable signature, so its arguments are unknown; wrap it in a function "
            "that names them, such as `def reward(latents, prompts): ...`"
        ) from error


def _signature(function: Any) -> inspect.Signature:
    """Of a module that of its `forward`, whatever it is wrapped in; of TorchScript what its schema says."""
    if isinstance(function, functools.partial):
        bound = functools.partial(lambda: None, *function.args, **function.keywords)
        bound.func.__signature__ = _signature(function.func)  # type: ignore[attr-defined]
        return inspect.signature(bound)
    if isinstance(function, nn.Module):
        function = innermost(function)
        function = function.forward if type(function).__call__ is nn.Module.__call__ else function
    schema = getattr(function, "schema", None)
    if schema is None:
        return inspect.signature(function)
    empty, kind = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(
                argument.name, kind, default=argument.default_value if argument.has_default_value() else empty
            )
            for argument in schema.arguments
            if argument.name != "self"
        ]
    )


def _read_scores(result: Any) -> tuple[Tensor, Tensor]:
    """Numbers with NaN for None, and which entries are not None."""
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError("it must be awaited; reward functions are called synchronously")
    if isinstance(result, Mapping):
        raise TypeError("return one number per row, not a mapping")
    if isinstance(result, tuple) and any(_is_collection(part) for part in result):
        kinds = ", ".join(type(part).__name__ for part in result)
        raise TypeError(f"return the scores alone, not a tuple of ({kinds})")
    if isinstance(result, Tensor):
        if result.is_complex():
            raise TypeError("complex numbers have no order")
        scores = result.detach().cpu()
        return scores, torch.ones_like(scores, dtype=torch.bool)
    if isinstance(result, Sequence) and not isinstance(result, str):
        missing = [value is None for value in result]
        if any(missing):
            if any(isinstance(value, (str, bytes)) for value in result):
                raise TypeError("text is no number")
            values = [float("nan") if absent else float(v) for v, absent in zip(result, missing, strict=True)]
            return torch.tensor(values, dtype=torch.float64), ~torch.tensor(missing)
    scores = torch.as_tensor(result, dtype=torch.float64).cpu()
    return scores, torch.ones_like(scores, dtype=torch.bool)


def _in_float32(scores: Tensor) -> Tensor:
    """Scores in float32.

    Raises:
        ValueError: scores that differ would all be equal in it, such as 1e9 and 1e9 + 1.
    """
    rounded, known = scores.float(), scores[torch.isfinite(scores)].double()
    if len(known) > 1 and len(known.float().unique()) == 1:
        spread, size = float(known.max() - known.min()), float(known.abs().max())
        if spread > 1e-10 * size:
            raise ValueError(
                f"they differ by {spread:g} but are all {size:g} in float32; subtract a constant from them"
            )
    return rounded


def _is_collection(value: Any) -> bool:
    return isinstance(value, (Mapping, Sequence)) or getattr(value, "ndim", 0) > 0


def raised(function: RewardFunction, error: Exception, available: Mapping[str, Any], batch_size: int) -> RewardError:
    """What to raise from an error inside a function: names it and the samples; no row has a score."""
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
