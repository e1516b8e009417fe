"""Step-wise credit: a noise-aware reward scores the states of a trajectory, and each step gets the gain it made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.rollout import Rollout
from dina_reward.alignment.samplers import Sampler
from dina_reward.reward_functions import callable_name


def check_scores_noisy(functions: Sequence[Any]) -> None:
    """Refuses reward functions that cannot score a noisy state.

    Raises:
        ValueError: naming the functions without a ``score_noisy`` method.
    """
    unable = [callable_name(function) for function in functions if not hasattr(function, "score_noisy")]
    if unable:
        raise ValueError(
            f"credit 'gain' scores noisy states, which {', '.join(unable)} cannot do: give rewards with a `score_noisy` "
            "method, such as LatentReward, or set credit to 'terminal'"
        )


@torch.no_grad()
def state_scores(
    functions: Sequence[Any],
    weights: Sequence[float],
    rollout: Rollout,
    sampler: Sampler,
    prompts: Sequence[str],
    device: torch.device | str,
) -> Tensor:
    """Weighted reward of every recorded state at the noise level it has, shape ``(batch, states)``, float32, on the CPU.

    Args:
        functions: rewards with ``score_noisy(noisy_latents, prompts, noise_level=...)``; see `LatentReward.score_noisy`.
        weights: one per reward.
        rollout: whose states are scored, in order.
        sampler: gives their noise levels.
        prompts: one per row.
        device: of the rewards; states may have been offloaded.
    """
    columns = []
    for index in sorted(rollout.states):
        state, level = rollout.states[index].to(device), float(sampler.levels[index])
        scores = [
            weight * function.score_noisy(state, list(prompts), noise_level=level).float().cpu()
            for function, weight in zip(functions, weights, strict=True)
        ]
        columns.append(torch.stack(scores).sum(dim=0))
    return torch.stack(columns, dim=1)


def gains_to_go(state_scores: Tensor, final_scores: Tensor, discount: float) -> Tensor:
    """``R_k = sum_{j >= k} discount^(j - k) (V_{j+1} - V_j)``, where ``V`` are the scores of the states and, last, the end.

    With ``discount = 0`` a step gets the gain it makes itself. With ``discount = 1`` the sum telescopes to ``V_end - V_k``:
    the final reward with the state's own score as its baseline.

    Args:
        state_scores (`Tensor`): shape ``(rows, states)``.
        final_scores (`Tensor`): shape ``(rows,)``.
        discount (`float`): in ``[0, 1]``.

    Returns:
        `Tensor`: shape ``(rows, states)``.
    """
    values = torch.cat([state_scores, final_scores[:, None]], dim=1)
    gains = values[:, 1:] - values[:, :-1]
    total = torch.zeros_like(final_scores)
    columns = []
    for gain in gains.unbind(dim=1)[::-1]:
        total = gain + discount * total
        columns.append(total)
    return torch.stack(columns[::-1], dim=1)
