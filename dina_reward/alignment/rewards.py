"""Calls reward functions and evaluators by keyword and checks what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.prompts import columns_of
from dina_reward.families.base import Conditioning


RewardFunction = Callable[..., Any]
"""Callable that takes some of the available keyword arguments and returns one number per row."""

_EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")


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


def accepted_arguments(function: RewardFunction, available: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``available`` that a function takes by keyword.

    A function with ``**kwargs`` gets everything. Prompt embeddings go only to functions that require them: one that takes
    ``prompts`` encodes them itself, at its own sequence length.

    Raises:
        ValueError: the function requires an argument that is not available.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(available)
    arguments: dict[str, Any] = {}
    for parameter in parameters:
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


def call_scorer(function: RewardFunction, available: Mapping[str, Any], batch_size: int) -> Tensor:
    """Scores one batch.

    Returns:
        `Tensor` of shape ``(batch_size,)``, float32, on the CPU.

    Raises:
        ValueError: the result does not hold one finite number per row.
    """
    name = callable_name(function)
    with torch.no_grad():
        result = function(**accepted_arguments(function, available))
    return checked_scores(name, result, batch_size)


def checked_scores(name: str, result: Any, batch_size: int) -> Tensor:
    """Scores as a float32 CPU tensor, or a `ValueError` that names the function; see `call_scorer`."""
    try:
        scores = torch.as_tensor(result, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} returned {type(result).__name__}, which does not hold numbers: {error}") from error
    if scores.shape != (batch_size,):
        raise ValueError(f"{name} returned shape {tuple(scores.shape)}; expected one number per row, ({batch_size},)")
    if not bool(torch.isfinite(scores).all()):
        row = int((~torch.isfinite(scores)).nonzero()[0])
        raise ValueError(f"{name} returned {float(scores[row])} for row {row} of {batch_size}; rewards must be finite")
    return scores


@dataclass(frozen=True)
class RewardSet:
    """The reward functions of a run with what they are told besides the samples.

    Every function is called by keyword with those of these arguments that its signature names: ``latents``, ``prompts``,
    ``prompt_embeds``, ``pooled_prompt_embeds``, ``seed`` (one integer per row), ``noise_level``, ``ensemble``,
    ``num_noise_samples``, and the columns of the prompt dataset. A `LatentReward` fits as it is.

    Args:
        functions: the callables.
        settings: arguments that are the same for all rows (``noise_level`` and so on).
    """

    functions: Sequence[RewardFunction]
    settings: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """One name per function, for logs."""
        return unique_names(self.functions)

    def score(
        self, latents: Tensor, rows: Sequence[Mapping[str, Any]], conditioning: Conditioning, seeds: Sequence[int]
    ) -> Tensor:
        """Scores clean latents.

        Args:
            latents (`Tensor`): shape ``(batch, ...)``.
            rows: dataset row of each latent.
            conditioning: encoded prompts, one row per latent.
            seeds: noise seed of each latent.

        Returns:
            `Tensor` of shape ``(batch, functions)``, float32, on the CPU.
        """
        available = {
            **columns_of(rows),
            **self.settings,
            "latents": latents,
            "prompt_embeds": conditioning.prompt_embeds,
            "pooled_prompt_embeds": conditioning.pooled_prompt_embeds,
            "seed": list(seeds),
        }
        return torch.stack([call_scorer(function, available, len(rows)) for function in self.functions], dim=1)
