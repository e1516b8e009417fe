"""Group-relative advantages of one or several rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

_EPS = 1e-4


@dataclass(frozen=True)
class Advantages:
    """Advantages and what they were made from.

    Args:
        advantages (`Tensor`): shape ``(rows,)``, float32.
        rewards (`Tensor`): weighted sum of the raw rewards, shape ``(rows,)``.
        group_std (`Tensor`): standard deviation of that sum in each group, shape ``(groups,)``.
        frac_reward_zero_std (`Tensor`): share of groups without any difference between members, scalar.
    """

    advantages: Tensor
    rewards: Tensor
    group_std: Tensor
    frac_reward_zero_std: Tensor


def compute_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    reward_weights: Sequence[float] | None = None,
    scale_rewards: ScaleRewards = "group",
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
) -> Advantages:
    """``A = (r - mean_group r) / (std + 1e-4)``, GRPO (arXiv 2402.03300).

    With several rewards, ``"sum_then_normalize"`` normalises their weighted sum. ``"normalize_then_sum"`` normalises
    each, sums them with their weights and standardises the sum over the batch (GDPO, arXiv 2601.05242), so that a reward
    with a larger spread does not drown the others.

    Args:
        rewards (`Tensor`): shape ``(rows, reward functions)`` over all ranks, or ``(rows,)``.
        group_ids (`Tensor`): integer group of each row, shape ``(rows,)``; the rows may come in any order.
        reward_weights: one weight per reward function, all 1 by default.
        scale_rewards: divide by the standard deviation in the ``"group"``, in the ``"batch"``, or by ``"none"``.

    Raises:
        ValueError: a reward is not finite, group ids are not integers, a group has one member, or shapes disagree.
    """
    rewards = _checked_rewards(rewards, group_ids)
    weights = _checked_weights(reward_weights, rewards)
    _check_choice("scale_rewards", scale_rewards, get_args(ScaleRewards))
    _check_choice("multi_objective_aggregation", multi_objective_aggregation, get_args(Aggregation))
    _, group_index, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if int(counts.min()) < 2:
        raise ValueError("a group has a single member, so its advantage is undefined; gather whole groups first")
    total = rewards @ weights
    group_std = _group_std(total, group_index, counts)
    if multi_objective_aggregation == "sum_then_normalize":
        advantages = _normalize(total, group_index, counts, scale_rewards)
    else:
        parts = [_normalize(column, group_index, counts, scale_rewards) for column in rewards.unbind(dim=1)]
        combined = torch.stack(parts, dim=1) @ weights
        advantages = (combined - combined.mean()) / (combined.std() + _EPS)
    zero_std = torch.isclose(group_std, torch.zeros_like(group_std)).float().mean()
    return Advantages(advantages.float(), total.float(), group_std.float(), zero_std)


def _normalize(values: Tensor, group_index: Tensor, counts: Tensor, scale_rewards: str) -> Tensor:
    centered = values - _group_mean(values, group_index, counts)[group_index]
    if scale_rewards == "group":
        return centered / (_group_std(values, group_index, counts)[group_index] + _EPS)
    if scale_rewards == "batch":
        return centered / (values.std() + _EPS)
    return centered


def _group_mean(values: Tensor, group_index: Tensor, counts: Tensor) -> Tensor:
    return values.new_zeros(len(counts)).index_add(0, group_index, values) / counts


def _group_std(values: Tensor, group_index: Tensor, counts: Tensor) -> Tensor:
    deviation = values - _group_mean(values, group_index, counts)[group_index]
    squares = values.new_zeros(len(counts)).index_add(0, group_index, deviation**2)
    return torch.sqrt(squares / (counts - 1))


def _checked_rewards(rewards: Tensor, group_ids: Tensor) -> Tensor:
    if rewards.ndim == 1:
        rewards = rewards[:, None]
    if rewards.ndim != 2 or group_ids.shape != rewards.shape[:1]:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)}; "
            "expected (rows, reward functions) and (rows,)"
        )
    if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise ValueError(
            f"group_ids are {group_ids.dtype}; they must be integers: float32 merges ids above 16,777,216"
        )
    finite = torch.isfinite(rewards)
    if not bool(finite.all()):
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{int((~finite).sum())} of {rewards.numel()} rewards are not finite; the first is row {row} of reward "
            f"function {column}: {float(rewards[row, column])}"
        )
    return rewards.double()  # in float32 the mean of equal rewards differs from them by rounding


def _checked_weights(reward_weights: Sequence[float] | None, rewards: Tensor) -> Tensor:
    if reward_weights is None:
        return rewards.new_ones(rewards.shape[1])
    if len(reward_weights) != rewards.shape[1]:
        raise ValueError(
            f"{len(reward_weights)} reward_weights for {rewards.shape[1]} reward functions; give one each"
        )
    return rewards.new_tensor(list(reward_weights))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
