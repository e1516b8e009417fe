"""Step-wise selection: the denoiser is not multiplied, and the best successor goes on."""

from __future__ import annotations

import pytest
import torch

from dina_reward.search import Stepwise
from tests.search.helpers import gaussian_run


def test_single_steps_do_not_multiply_the_denoiser() -> None:
    run = gaussian_run(prompts=2, budget=2, steps=8)
    particles, scores = Stepwise(branches=4, window=(0.0, 0.75)).run(run)
    assert run.generator.calls.rollout == 2 * 2 * 8
    assert run.generator.calls.reward == 2 * 2 * (6 * 4 + 1)
    assert [check.step for check in run.trace] == [1, 2, 3, 4, 5, 6, 8]
    for check in run.trace[:-1]:
        table = check.scores.view(4, 4)
        assert torch.equal(check.scores[check.kept], table.max(dim=1).values)
        assert len(table.unique()) == 16
    # Chains end far above plain samples, and the best of two is returned.
    assert float(scores.min()) > 1.0
    assert torch.equal(scores, run.trace[-1].scores.view(2, 2).max(dim=1).values)
    torch.testing.assert_close(particles.latents.flatten(), scores)


@pytest.mark.parametrize(
    ("branches", "block", "expected"),
    [(4, 1, 10), (4, 2, 3 * (1 + 4) + 4), (2, 3, 2 * 5 + 4), (3, 4, 1 + 9 + 1 + 3 + 4)],
)
def test_costs_by_hand(branches: int, block: int, expected: int) -> None:
    settings = Stepwise(branches=branches, block=block, window=(0.0, 0.6))
    assert settings.cost(10) == expected
    run = gaussian_run(steps=10, budget=expected / 10)
    settings.run(run)
    assert run.generator.calls.rollout == expected


def test_rewards_that_need_predictions_take_a_call_per_branch() -> None:
    settings = Stepwise(branches=4, window=(0.0, 0.6))
    assert settings.cost(10, lookahead=1) == 10 + 6 * 3
    run = gaussian_run(steps=10, budget=3)
    run.judge.needs_prediction = True  # type: ignore[misc]
    settings.run(run)
    assert run.generator.calls.rollout == 28


def test_a_budget_that_does_not_pay_for_a_chain_is_refused() -> None:
    message = r"does not pay for one chain: that takes the denoiser calls of 1.9 samples per prompt and 1 are left"
    with pytest.raises(ValueError, match=message):
        Stepwise(branches=4, block=2, window=(0.0, 0.6)).run(gaussian_run(steps=10, budget=1))
    with pytest.raises(ValueError, match="window must be two increasing shares"):
        Stepwise(window=(0.5, 0.5))
