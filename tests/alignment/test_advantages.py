from __future__ import annotations

import math

import pytest
import torch

from dina_reward.alignment.advantages import compute_advantages


REWARDS = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 60.0], [5.0, 0.0], [5.0, 0.0], [5.0, 3.0]])
GROUPS = torch.tensor([4, 4, 4, 9, 9, 9])


def test_group_advantages_are_standardised_in_each_group():
    result = compute_advantages(REWARDS[:, 0], GROUPS)
    expected = (REWARDS[:3, 0] - 2) / (1 + 1e-4)
    torch.testing.assert_close(result.advantages[:3], expected)
    assert torch.equal(result.advantages[3:], torch.zeros(3))
    assert float(result.frac_reward_zero_std) == 0.5
    torch.testing.assert_close(result.group_std, torch.tensor([1.0, 0.0]))


def test_equal_rewards_that_float32_cannot_average_count_as_equal():
    result = compute_advantages(torch.full((7,), 7.1), torch.zeros(7, dtype=torch.int64))
    assert float(result.frac_reward_zero_std) == 1
    assert float(result.advantages.abs().max()) < 1e-6


@pytest.mark.parametrize(("scale", "divisor"), [("none", 1.0), ("batch", float(REWARDS[:, 0].std()) + 1e-4)])
def test_other_scales(scale, divisor):
    result = compute_advantages(REWARDS[:, 0], GROUPS, scale_rewards=scale)
    torch.testing.assert_close(result.advantages, torch.tensor([-1.0, 0, 1, 0, 0, 0]) / divisor)


def test_order_of_rows_does_not_matter():
    order = torch.tensor([5, 0, 3, 2, 4, 1])
    straight = compute_advantages(REWARDS, GROUPS).advantages
    torch.testing.assert_close(compute_advantages(REWARDS[order], GROUPS[order]).advantages, straight[order])


def test_sum_then_normalize_uses_the_weighted_sum():
    result = compute_advantages(REWARDS, GROUPS, reward_weights=[2.0, 0.5])
    alone = compute_advantages(REWARDS @ torch.tensor([2.0, 0.5]), GROUPS)
    torch.testing.assert_close(result.advantages, alone.advantages)
    torch.testing.assert_close(result.rewards, REWARDS @ torch.tensor([2.0, 0.5]))


def test_normalize_then_sum_ignores_the_spread_of_a_reward():
    scaled = REWARDS * torch.tensor([1.0, 1000.0])
    a = compute_advantages(REWARDS, GROUPS, multi_objective_aggregation="normalize_then_sum").advantages
    b = compute_advantages(scaled, GROUPS, multi_objective_aggregation="normalize_then_sum").advantages
    torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert float(a.mean()) == pytest.approx(0, abs=1e-6)
    assert float(a.std()) == pytest.approx(1, abs=1e-3)


def test_large_group_ids_stay_apart():
    # 2^24 and 2^24 + 1 are the same number in float32.
    ids = torch.tensor([2**24, 2**24, 2**24 + 1, 2**24 + 1])
    result = compute_advantages(torch.tensor([0.0, 1.0, 10.0, 11.0]), ids, scale_rewards="none")
    torch.testing.assert_close(result.advantages, torch.tensor([-0.5, 0.5, -0.5, 0.5]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_rewards_are_refused(bad):
    rewards = REWARDS.clone()
    rewards[2, 1] = bad
    with pytest.raises(ValueError, match="the first is row 2 of reward function 1"):
        compute_advantages(rewards, GROUPS)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="must be integers"):
        compute_advantages(REWARDS, GROUPS.float())
    with pytest.raises(ValueError, match="single member"):
        compute_advantages(REWARDS, torch.tensor([1, 1, 1, 2, 2, 3]))
    with pytest.raises(ValueError, match="3 reward_weights for 2 reward functions"):
        compute_advantages(REWARDS, GROUPS, reward_weights=[1, 1, 1])
    with pytest.raises(ValueError, match="expected \\(rows, reward functions\\)"):
        compute_advantages(REWARDS, GROUPS[:4])
    with pytest.raises(ValueError, match="unknown scale_rewards 'std'"):
        compute_advantages(REWARDS, GROUPS, scale_rewards="std")
    with pytest.raises(ValueError, match="unknown multi_objective_aggregation 'max'"):
        compute_advantages(REWARDS, GROUPS, multi_objective_aggregation="max")
