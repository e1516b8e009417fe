"""Preference pairs that a dataset brings along, in place of groups that the policy samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.experience.maker import Experience, ExperienceMaker
from dina_reward.alignment.sampling.rollout import Rollout
from dina_reward.checks.values import is_real


SIDES = ("chosen", "rejected")
P_CHOSEN, WEIGHT = "p_chosen", "weight"

GIVEN_VARIANCE = 0.5
"""Variance of one reward, of which the difference of two has a variance of 1."""

_SUREST = 1 - 1e-6
"""Probabilities are cut here: a sure pair has a finite margin."""


def has_pairs(columns: Sequence[str]) -> bool:
    """Whether rows with these columns are pairs of latents.

    Raises:
        ValueError: one side is there and not the other.
    """
    found = [side for side in SIDES if side in columns]
    if len(found) == 1:
        raise ValueError(
            f"train_dataset has a column {found[0]!r} and none for the other side of a pair; pairs are rows with 'prompt', "
            "'chosen' and 'rejected'"
        )
    return bool(found)


def given_experience(maker: ExperienceMaker, generation: int) -> tuple[list[Experience], dict[str, float]]:
    """One pair per group of two: its chosen latents first. Nothing is sampled, and nothing scored.

    Rewards are those to whose difference the Thurstone model with `GIVEN_VARIANCE` gives the probability ``p_chosen``: 0 for
    the rejected side and ``Phi^-1(p_chosen)`` for the chosen one. A tie, of equal rewards, makes no pair.

    Raises:
        ValueError: sides that are not latents of one sample of the generator, or no probability where there should be one.
    """
    geometry, rank = maker.prompts.geometry, maker.accelerator.process_index
    negative = maker.policy.encode_negative(maker.device)
    parts = []
    for rows in (geometry.rows_of(chunk, rank) for chunk in range(geometry.num_chunks)):
        conditioning, pairs, prompt_index = maker.encode(generation, rows)
        placed = list(zip(pairs, (row % 2 for row in rows), strict=True))
        latents = torch.stack([_side(pair, SIDES[place], maker.latent_shape) for pair, place in placed])
        margins = [0.0 if place else _margin(pair) for pair, place in placed]
        parts.append(
            Experience(
                generation=generation,
                rows=rows,
                rollout=Rollout(latents.to(maker.device, maker.policy.storage_dtype)),
                prompts=[pair["prompt"] for pair in pairs],
                conditioning=conditioning,
                prompt_index=prompt_index,
                negative=negative,
                rewards=torch.tensor(margins, device=maker.device),
                advantages=torch.zeros(len(rows), device=maker.device),
                weights=torch.tensor([_weight(pair) for pair in pairs], device=maker.device),
            )
        )
    margins_of_all = maker.accelerator.gather(torch.cat([part.rewards[::2] for part in parts]))
    return parts, {"pairs/p_chosen": float(torch.special.ndtr(margins_of_all).mean())}


def _side(pair: dict[str, Any], side: str, shape: Sequence[int]) -> Tensor:
    try:
        latents = torch.as_tensor(pair[side], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the {side!r} side of a pair for {pair['prompt']!r:.80} is a {type(pair[side]).__name__}, not latents: {error}"
        ) from error
    if tuple(latents.shape) != tuple(shape):
        raise ValueError(
            f"the {side!r} side of a pair for {pair['prompt']!r:.80} has the shape {tuple(latents.shape)}; expected latents "
            f"of one sample, {tuple(shape)}, for the configuration's height and width"
        )
    if not bool(latents.isfinite().all()):
        raise ValueError(f"the {side!r} side of a pair for {pair['prompt']!r:.80} has values that are not finite")
    return latents


def _weight(pair: dict[str, Any]) -> float:
    """Its weight in the loss; 1 where it states none, 0 of one that could not be read."""
    weight = 1.0 if pair.get(WEIGHT) is None else pair[WEIGHT]
    if not is_real(weight) or weight < 0:
        raise ValueError(
            f"weight of a pair for {pair['prompt']!r:.80} must be a number of at least 0, got {weight!r:.80}"
        )
    return float(weight)


def _margin(pair: dict[str, Any]) -> float:
    """``Phi^-1(p_chosen)``; of a pair that states no probability, that of a sure one."""
    p = pair.get(P_CHOSEN)
    if p is None:
        p = 1.0
    if not is_real(p) or not 0 <= p <= 1:
        raise ValueError(f"p_chosen of a pair for {pair['prompt']!r:.80} must be a probability, got {p!r:.80}")
    return float(torch.special.ndtri(torch.tensor(float(p)).clamp(1 - _SUREST, _SUREST).double()))
