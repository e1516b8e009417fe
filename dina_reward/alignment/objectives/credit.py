"""Step-wise credit: each step of a trajectory gets the rise that it makes in the reward of the predicted clean latent.

What a step should be credited with is its own effect, ``Q_k = E[r | x_{k+1}] - E[r | x_k]``. The terminal reward contains
it, and besides the luck of the initial latent and of all other stochastic steps. With a value ``V`` of states, the gain
``V(x_{k+1}) - V(x_k)`` is free of both, as far as ``V`` knows where a state leads.

``V`` is the reward of the ``x_0`` prediction at the state: at the noise level and under the noise at which the final latent
is scored, so that both cancel along the trajectory; the prediction is at hand, so it costs one reward call and no denoiser
call. After the last stochastic step the end is determined, and ``V`` is the final reward itself. The noisy state, scored
as it is at its own level (`LatentReward.score_noisy`), would make a poor ``V``, though it predicts the final reward: scores
of different levels differ in scale, the more noise the wider, so that the difference of two of them tells more about the
levels than about the step. `python -m dina_reward.shapes.step_correlation` measures both against the effects themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gains_to_go(values: Tensor, final_rewards: Tensor, discount: float) -> Tensor:
    """``R_k = sum_{j >= k} discount^(j - k) (V_{j+1} - V_j)``, where ``V`` are the values of the states and, last, the end.

    With ``discount = 0`` a step gets the gain it makes itself. With ``discount = 1`` the sum telescopes to ``V_end - V_k``:
    the final reward with the value of the state as its baseline, which has no bias whatever ``V`` is, and the variance of
    all later steps.

    Args:
        values (`Tensor`): of the states before the stochastic steps, shape ``(rows, states)``.
        final_rewards (`Tensor`): shape ``(rows,)``.
        discount (`float`): in ``[0, 1]``.

    Returns:
        `Tensor`: shape ``(rows, states)``.
    """
    values = torch.cat([values, final_rewards[:, None]], dim=1)
    gains = values[:, 1:] - values[:, :-1]
    total = torch.zeros_like(final_rewards)
    columns = []
    for gain in gains.unbind(dim=1)[::-1]:
        total = gain + discount * total
        columns.append(total)
    return torch.stack(columns[::-1], dim=1)
