"""Advantages of one or several rewards: relative to the group, or to the history of the prompt."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dina_reward.checks.tensors import check_numbers
from dina_reward.checks.values import check_choice, check_numbers_list


ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]

_EPS = 1e-4
_HISTORY_EPS = 1e-6
_FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Advantages:
    """Advantages and what they were made from.

    Args:
        advantages (`Tensor`): shape ``(rows,)``, float32; 0 where not ``valid``.
        rewards (`Tensor`): weighted sum of the raw rewards, shape ``(rows,)``, float32. Missing ones count as the mean of
            the group, so rows that are not ``valid`` have the group's mean.
        group_std (`Tensor`): standard deviation of that sum over the valid rows of each group, shape ``(groups,)``.
        frac_reward_zero_std (`Tensor`): share of groups whose members do not differ, scalar.
        valid (`Tensor`): whether any reward function applies to the row, shape ``(rows,)``, bool.
        zero_std (`Tensor`): whether the row's group gives no signal, shape ``(rows,)``, bool.
    """

    advantages: Tensor
    rewards: Tensor
    group_std: Tensor
    frac_reward_zero_std: Tensor
    valid: Tensor
    zero_std: Tensor


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

    A NaN says that a function does not apply to a row. It counts as the mean of the function over the group's rows that
    it applies to, so the row neither gains nor loses by it; a function that applies to no row of a group adds nothing
    there. A row to which no function (of weight other than 0) applies is not ``valid``: it is left out of every mean and
    standard deviation and has advantage 0.

    A group has zero standard deviation if its sums (with ``"normalize_then_sum"``: the rewards of every function) differ
    by no more than the resolution of float32.

    Args:
        rewards (`Tensor`): shape ``(rows, reward functions)`` over all ranks, or ``(rows,)``; NaN for "does not apply".
        group_ids (`Tensor`): integer group of each row, shape ``(rows,)``; the rows may come in any order.
        reward_weights: one weight per reward function, all 1 by default.
        scale_rewards: divide by the standard deviation in the ``"group"``, in the ``"batch"``, or by ``"none"``.

    Raises:
        ValueError: a reward is infinite, group ids are not integers, a group has one member, or shapes disagree.
    """
    rewards = _checked_rewards(rewards, group_ids)
    weights = _checked_weights(reward_weights, rewards)
    check_choice("scale_rewards", scale_rewards, get_args(ScaleRewards))
    check_choice("multi_objective_aggregation", multi_objective_aggregation, get_args(Aggregation))
    _, group_index, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    if int(counts.min()) < 2:
        raise ValueError(
            "a group has a single member, so its advantage is undefined; gather whole groups first, or compare with the "
            "prompt's history (`PerPromptStatTracker`)"
        )
    groups = _Groups(group_index, len(counts))
    filled, valid = _fill_missing(rewards, weights, groups)
    total = filled @ weights
    group_std = groups.std(total, valid)
    if multi_objective_aggregation == "sum_then_normalize":
        advantages = _normalize(total, valid, groups, scale_rewards)
        zero_std = group_std <= _FLOAT32_EPS * groups.max(filled.abs() @ weights.abs(), valid)
    else:
        pairs = [(column, ~torch.isnan(column)) for column in rewards[:, weights != 0].unbind(dim=1)]
        parts = [_normalize(column, where, groups, scale_rewards) for column, where in pairs]
        advantages = _standardize(torch.stack(parts, dim=1) @ weights[weights != 0], valid)
        equal = [groups.std(c, where) <= _FLOAT32_EPS * groups.max(c.abs(), where) for c, where in pairs]
        zero_std = torch.stack(equal, dim=1).all(dim=1)
    return Advantages(
        advantages=advantages.where(valid, 0.0).float(),
        rewards=total.float(),
        group_std=group_std.float(),
        frac_reward_zero_std=zero_std.float().mean(),
        valid=valid,
        zero_std=zero_std[group_index],
    )


def extremes(advantages: Tensor, valid: Tensor, group_size: int, keep: int) -> Tensor:
    """Which rows are among the ``keep / 2`` best or worst of their group, shape ``(rows,)``, bool.

    Best-of-N training of DanceGRPO (arXiv 2505.07818): the middle of a group says little and costs as much. Of equal rows,
    the first is the best; rows that are not valid are never taken.

    Args:
        advantages: shape ``(rows,)``; members of a group are neighbours.
        valid: whether the row has a reward, same shape, bool.
        group_size: rows per group.
        keep: even number of rows per group.
    """
    groups, counts = advantages.where(valid, -torch.inf).view(-1, group_size), valid.view(-1, group_size).sum(1, True)
    rank = groups.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (((rank < keep // 2) | (rank >= counts - keep // 2)) & (rank < counts)).flatten()


class PerPromptStatTracker:
    """Rewards of each prompt over the last generations, DDPO (arXiv 2305.13301).

    ``A = (r - mean) / (std + 1e-6)`` with mean and (population) standard deviation of the prompt's last ``buffer_size``
    rewards, the new ones included, once there are ``min_count``; before, those of the batch. Groups may have a single
    member. Prompts are told apart by their text.

    Args:
        buffer_size (`int`): rewards kept per prompt.
        min_count (`int`): rewards of a prompt from which its own statistics are used; above ``buffer_size``, never.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        if buffer_size < 1 or min_count < 1:
            raise ValueError(f"buffer_size {buffer_size} and min_count {min_count} must be at least 1")
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.history: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Adds the rewards of a generation and returns their advantages.

        Call it on every rank alike with the rows of all ranks in row order: buffers then do not depend on the ranks.

        Args:
            prompts: one per row.
            rewards (`Tensor`): shape ``(rows,)``; NaN for "does not apply": advantage 0, and nothing is remembered.

        Returns:
            `Tensor` of shape ``(rows,)``, float32.

        Raises:
            ValueError: shapes disagree or a reward is infinite.
        """
        return self._update(prompts, rewards)[0].float()

    def _update(self, prompts: Sequence[str], rewards: Tensor) -> tuple[Tensor, Tensor]:
        if len(prompts) == 0 or rewards.shape != (len(prompts),):
            raise ValueError(f"rewards have shape {tuple(rewards.shape)}; expected ({len(prompts)},), one per prompt")
        _check_not_infinite(rewards[:, None])
        values = rewards.detach().cpu().double()
        valid = ~torch.isnan(values)
        for prompt, value in zip(prompts, values.tolist(), strict=True):
            if value == value:
                self.history.setdefault(prompt, deque(maxlen=self.buffer_size)).append(value)
        batch = _mean_and_std(values[valid])
        found = {prompt: self._statistics(prompt, batch) for prompt in set(prompts)}
        mean, std = torch.tensor([found[prompt] for prompt in prompts], dtype=torch.float64).reshape(-1, 2).T
        return ((values - mean) / (std + _HISTORY_EPS)).where(valid, 0.0), std

    def advantages(
        self, prompts: Sequence[str], rewards: Tensor, reward_weights: Sequence[float] | None = None
    ) -> Advantages:
        """Advantages of the weighted sum of several rewards against the history of that sum; see `update`.

        Rows of the batch with the same prompt form a group, of any size. Missing rewards are treated as in
        `compute_advantages`. ``zero_std`` says that the statistics in use have no spread.

        Args:
            prompts: one per row.
            rewards (`Tensor`): shape ``(rows, reward functions)`` over all ranks in row order, or ``(rows,)``.
            reward_weights: one weight per reward function, all 1 by default.

        Raises:
            ValueError: a reward is infinite, or shapes disagree.
        """
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        group_index = torch.tensor([numbers[prompt] for prompt in prompts], dtype=torch.int64)
        rewards = _checked_rewards(rewards.cpu(), group_index)
        weights = _checked_weights(reward_weights, rewards)
        groups = _Groups(group_index, len(numbers))
        filled, valid = _fill_missing(rewards, weights, groups)
        total = filled @ weights
        advantages, std = self._update(prompts, total.where(valid, torch.nan))
        zero_std = std <= _FLOAT32_EPS * groups.max(filled.abs() @ weights.abs(), valid)[group_index]
        return Advantages(
            advantages=advantages.float(),
            rewards=total.float(),
            group_std=groups.std(total, valid).float(),
            frac_reward_zero_std=(groups.sum(zero_std.double()) > 0).float().mean(),
            valid=valid,
            zero_std=zero_std,
        )

    def _statistics(self, prompt: str, batch: tuple[float, float]) -> tuple[float, float]:
        history = self.history.get(prompt, ())
        return _mean_and_std(torch.tensor(list(history)).double()) if len(history) >= self.min_count else batch

    def state_dict(self) -> dict[str, Any]:
        """Buffers as plain JSON types."""
        return {"history": {prompt: list(values) for prompt, values in self.history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the buffers; of longer ones, only the last ``buffer_size`` rewards stay.

        Raises:
            ValueError: ``state`` was not made by `state_dict`.
        """
        history = state.get("history")
        if not isinstance(history, Mapping):
            raise ValueError(f"expected the state of a PerPromptStatTracker with 'history', got keys {sorted(state)}")
        self.history = {
            str(prompt): deque((float(value) for value in values), maxlen=self.buffer_size)
            for prompt, values in history.items()
        }


@dataclass(frozen=True)
class _Groups:
    """Sums over the rows of each group; ``where`` says which rows count."""

    index: Tensor
    count: int

    def sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.count).index_add(0, self.index, values)

    def max(self, values: Tensor, where: Tensor) -> Tensor:
        return values.new_zeros(self.count).scatter_reduce(0, self.index, values.where(where, 0.0), "amax")

    def mean(self, values: Tensor, where: Tensor) -> Tensor:
        """0 for a group without rows that count."""
        return self.sum(values.where(where, 0.0)) / self.sum(where.to(values.dtype)).clamp(min=1)

    def centered(self, values: Tensor, where: Tensor) -> Tensor:
        """Deviation from the mean of the group; 0 for rows that do not count."""
        return (values - self.mean(values, where)[self.index]).where(where, 0.0)

    def std(self, values: Tensor, where: Tensor) -> Tensor:
        """0 for a group in which fewer than two rows count."""
        squares = self.sum(self.centered(values, where) ** 2)
        return torch.sqrt(squares / (self.sum(where.to(values.dtype)) - 1).clamp(min=1))


def _fill_missing(rewards: Tensor, weights: Tensor, groups: _Groups) -> tuple[Tensor, Tensor]:
    """Rewards with means for NaN, and the rows to which a function applies.

    The mean is over the group, or over the batch where a function applies to no row of the group: a constant in the group,
    which gives no advantage and does not drag the other groups' statistics along.
    """
    applies = ~torch.isnan(rewards)
    columns = []
    for column, where in zip(rewards.unbind(1), applies.unbind(1), strict=True):
        overall = column[where].mean() if bool(where.any()) else column.new_zeros(())
        known = groups.sum(where.to(column.dtype)) > 0
        means = groups.mean(column, where).where(known, overall)
        columns.append(column.where(where, means[groups.index]))
    return torch.stack(columns, dim=1), applies[:, weights != 0].any(dim=1)


def _normalize(values: Tensor, where: Tensor, groups: _Groups, scale_rewards: str) -> Tensor:
    centered = groups.centered(values, where)
    if scale_rewards == "group":
        return centered / (groups.std(values, where)[groups.index] + _EPS)
    if scale_rewards == "batch":
        return centered / (_std(values[where]) + _EPS)
    return centered


def _standardize(values: Tensor, where: Tensor) -> Tensor:
    chosen = values[where]
    return (values - chosen.mean()) / (_std(chosen) + _EPS) if len(chosen) else values


def _std(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else values.new_zeros(())


def _mean_and_std(values: Tensor) -> tuple[float, float]:
    return (float(values.mean()), float(values.std(correction=0))) if len(values) else (0.0, 0.0)


def _checked_rewards(rewards: Tensor, group_ids: Tensor) -> Tensor:
    for name, values in (("rewards", rewards), ("group_ids", group_ids)):
        check_numbers(name, values)
    if rewards.ndim == 1:
        rewards = rewards[:, None]
    if rewards.ndim != 2 or group_ids.shape != rewards.shape[:1]:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)} and group_ids {tuple(group_ids.shape)}; "
            "expected (rows, reward functions) and (rows,)"
        )
    if group_ids.is_floating_point():
        raise ValueError(
            f"group_ids are {group_ids.dtype}; they must be integers: float32 merges ids above 16,777,216"
        )
    _check_not_infinite(rewards)
    return rewards.double()  # in float32 the mean of equal rewards differs from them by rounding


def _check_not_infinite(rewards: Tensor) -> None:
    infinite = torch.isinf(rewards)
    if bool(infinite.any()):
        row, column = infinite.nonzero()[0].tolist()
        raise ValueError(
            f"{int(infinite.sum())} of {rewards.numel()} rewards are infinite; the first is row {row} of reward function "
            f"{column}: {float(rewards[row, column])}"
        )


def _checked_weights(reward_weights: Sequence[float] | None, rewards: Tensor) -> Tensor:
    if reward_weights is None:
        return rewards.new_ones(rewards.shape[1])
    check_numbers_list("reward_weights", reward_weights)
    if len(reward_weights) != rewards.shape[1]:
        raise ValueError(
            f"{len(reward_weights)} reward_weights for {rewards.shape[1]} reward functions; give one each"
        )
    weights = rewards.new_tensor(list(reward_weights))
    if not bool((weights != 0).any()):
        raise ValueError("all reward_weights are 0, so there is nothing to train on")
    return weights
