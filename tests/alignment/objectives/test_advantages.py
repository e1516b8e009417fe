from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dina_reward.alignment.objectives.advantages import PerPromptStatTracker, compute_advantages, extremes


NAN = math.nan
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


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_infinite_rewards_are_refused(bad):
    rewards = REWARDS.clone()
    rewards[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 12 rewards are infinite; the first is row 2 of reward function 1"):
        compute_advantages(rewards, GROUPS)
    with pytest.raises(ValueError, match="the first is row 2 of reward function 1"):
        PerPromptStatTracker().advantages(list("aaabbb"), rewards)


AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
SCALES = ("group", "batch", "none")


def test_a_missing_reward_neither_gains_nor_loses():
    rewards = torch.tensor([[1.0, 100.0], [2.0, NAN], [3.0, 300.0]])
    result = compute_advantages(rewards, torch.zeros(3, dtype=torch.int64), scale_rewards="none")
    # The missing entry takes the 200 of the other two.
    assert result.rewards.tolist() == [101, 202, 303]
    torch.testing.assert_close(result.advantages, torch.tensor([-101.0, 0, 101]))
    assert result.valid.all()
    lone = compute_advantages(
        rewards, torch.zeros(3, dtype=torch.int64), multi_objective_aggregation="normalize_then_sum"
    )
    assert float(lone.advantages[1]) == pytest.approx(0, abs=1e-6)


def test_a_reward_without_rows_in_a_group_adds_nothing_there():
    rewards = torch.tensor([[0.0, 1000.0], [1.0, 1000.0], [0.0, NAN], [1.0, NAN]])
    groups = torch.tensor([0, 0, 1, 1])
    for aggregation in AGGREGATIONS:
        for scale in SCALES:
            both = compute_advantages(
                rewards, groups, scale_rewards=scale, multi_objective_aggregation=aggregation
            ).advantages
            first = compute_advantages(
                rewards[:, 0], groups, scale_rewards=scale, multi_objective_aggregation=aggregation
            ).advantages
            torch.testing.assert_close(both, first)


def test_rows_without_any_reward_are_not_valid():
    rewards = torch.tensor([[1.0, 1.0], [2.0, 1.0], [NAN, NAN], [NAN, 5.0], [NAN, NAN], [NAN, NAN]])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    result = compute_advantages(rewards, groups, reward_weights=[1.0, 0.0])
    # Row 3 only has a reward that does not count.
    assert result.valid.tolist() == [True, True, False, False, False, False]
    torch.testing.assert_close(result.advantages[:2], torch.tensor([-1.0, 1.0]) * 0.5 / (0.5**0.5 + 1e-4))
    assert result.advantages[2:].tolist() == [0, 0, 0, 0]
    assert result.rewards.tolist() == [1, 2, 1.5, 1.5, 1.5, 1.5]
    assert result.zero_std.tolist() == [False] * 4 + [True] * 2
    assert result.group_std.tolist() == pytest.approx([0.5**0.5, 0])


def test_zero_std_is_a_matter_of_float32_resolution():
    equal, resolvable = [7.1, float(torch.tensor(7.1).nextafter(torch.tensor(8.0)))], [7.1, 7.1001]
    rewards = torch.tensor([*equal, *resolvable])
    result = compute_advantages(rewards, torch.tensor([0, 0, 1, 1]))
    assert result.zero_std.tolist() == [True, True, False, False]
    assert float(result.frac_reward_zero_std) == 0.5


def test_opposite_rewards_cancel_only_when_they_are_summed_first():
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 3.0], [4.0, 3.0]])
    groups = torch.tensor([0, 0, 1, 1])
    assert compute_advantages(rewards, groups).zero_std.tolist() == [True, True, False, False]
    each = compute_advantages(rewards, groups, multi_objective_aggregation="normalize_then_sum")
    assert not each.zero_std.any()
    # A large constant reward does not hide the spread of a small one that is normalised by itself.
    large = compute_advantages(
        torch.tensor([[1e8, 0.0], [1e8, 1.0]]), groups[:2], multi_objective_aggregation="normalize_then_sum"
    )
    assert not large.zero_std.any()


numbers = st.floats(-1e3, 1e3, width=32)


@st.composite
def rewards_and_groups(draw, missing: bool = True):
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))
    functions = draw(st.integers(1, 3))
    entry = st.one_of(numbers, st.just(NAN)) if missing else numbers
    rows = [draw(st.lists(entry, min_size=functions, max_size=functions)) for _ in range(sum(sizes))]
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(groups)


@settings(max_examples=30, deadline=None)
@given(rewards_and_groups(), st.sampled_from(AGGREGATIONS), st.sampled_from(SCALES), st.randoms())
def test_any_order_of_rows_and_group_names(case, aggregation, scale, random):
    rewards, groups = case
    order = torch.tensor(random.sample(range(len(groups)), len(groups)))
    options = {"scale_rewards": scale, "multi_objective_aggregation": aggregation}
    straight = compute_advantages(rewards, groups, **options)
    shuffled = compute_advantages(rewards[order], 7 - groups[order], **options)
    assert torch.isfinite(straight.advantages).all()
    assert torch.equal(shuffled.valid, straight.valid[order])
    torch.testing.assert_close(shuffled.advantages, straight.advantages[order], rtol=1e-3, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(rewards_and_groups(missing=False), st.sampled_from(AGGREGATIONS), st.sampled_from(SCALES))
def test_a_row_without_rewards_is_like_no_row(case, aggregation, scale):
    rewards, groups = case
    options = {"scale_rewards": scale, "multi_objective_aggregation": aggregation}
    without = compute_advantages(rewards, groups, **options)
    empty = torch.full((1, rewards.shape[1]), NAN)
    result = compute_advantages(torch.cat([rewards, empty]), torch.cat([groups, groups[:1]]), **options)
    torch.testing.assert_close(result.advantages[:-1], without.advantages, rtol=1e-5, atol=1e-5)
    assert float(result.advantages[-1]) == 0
    assert torch.equal(result.zero_std[:-1], without.zero_std)


@settings(max_examples=30, deadline=None)
@given(rewards_and_groups(), st.floats(0.25, 4), st.sampled_from(SCALES))
def test_advantages_have_no_mean_in_a_group_and_follow_the_weights(case, factor, scale):
    rewards, groups = case
    assume(not torch.isnan(rewards).all())
    plain = compute_advantages(rewards, groups, scale_rewards="none")
    sums = torch.zeros(4).index_add(0, groups, plain.advantages)
    torch.testing.assert_close(sums, torch.zeros(4), atol=2e-3, rtol=0)
    weights = [factor] * rewards.shape[1]
    scaled = compute_advantages(rewards, groups, reward_weights=weights, scale_rewards="none")
    torch.testing.assert_close(scaled.advantages, factor * plain.advantages, rtol=1e-4, atol=1e-3)
    first = torch.zeros(rewards.shape[1])
    first[0] = 1
    chosen = compute_advantages(rewards, groups, reward_weights=first.tolist(), scale_rewards=scale)
    alone = compute_advantages(rewards[:, 0], groups, scale_rewards=scale)
    torch.testing.assert_close(chosen.advantages, alone.advantages)
    assert torch.equal(chosen.valid, alone.valid)


def test_tracker_uses_the_batch_until_a_prompt_has_history():
    tracker = PerPromptStatTracker(buffer_size=4, min_count=3)
    first = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(
        tracker.update(["a", "a", "b"], first), (first - 3) / (float(first.std(correction=0)) + 1e-6)
    )
    second = tracker.update(["a", "b"], torch.tensor([6.0, 8.0]))
    own = torch.tensor([1.0, 2.0, 6.0])  # three rewards of "a"; "b" has two and takes those of the batch, 6 and 8
    expected = [3 / (float(own.std(correction=0)) + 1e-6), 1 / (1 + 1e-6)]
    torch.testing.assert_close(second, torch.tensor(expected))
    tracker.update(["a", "a"], torch.tensor([3.0, 4.0]))
    assert list(tracker.history["a"]) == [2, 6, 3, 4]


def test_tracker_skips_missing_rewards():
    tracker = PerPromptStatTracker(min_count=2)
    advantages = tracker.update(["a", "a", "b"], torch.tensor([1.0, NAN, 3.0]))
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 0, 1]), atol=1e-5, rtol=0)
    assert {prompt: list(values) for prompt, values in tracker.history.items()} == {"a": [1], "b": [3]}
    assert tracker.update(["c"], torch.tensor([NAN])).tolist() == [0]


def test_tracker_never_uses_a_history_that_cannot_fill():
    tracker = PerPromptStatTracker(1, 2)
    for _ in range(3):
        advantages = tracker.update(["a", "a"], torch.tensor([0.0, 2.0]))
        torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0]), atol=1e-5, rtol=0)


def test_tracker_resumes_from_json():
    rewards = torch.tensor([0.1, 0.7, 0.3, 0.2])
    tracker = PerPromptStatTracker(4, 2)
    tracker.update(["a", "a", "b", "b"], rewards)
    restored = PerPromptStatTracker(4, 2)
    restored.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    assert torch.equal(restored.update(["a", "b"], rewards[:2]), tracker.update(["a", "b"], rewards[:2]))
    shorter = PerPromptStatTracker(2, 2)
    shorter.load_state_dict(tracker.state_dict())
    assert list(shorter.history["a"]) == list(tracker.history["a"])[-2:]
    with pytest.raises(ValueError, match="expected the state of a PerPromptStatTracker"):
        restored.load_state_dict({"buffers": {}})


def test_tracker_advantages_of_several_rewards():
    tracker = PerPromptStatTracker(8, 2)
    rewards = torch.tensor([[1.0, 10.0], [3.0, NAN], [5.0, NAN], [NAN, NAN], [2.0, 2.0]])
    prompts = ["a", "a", "b", "b", "c"]
    result = tracker.advantages(prompts, rewards, [1.0, 0.5])
    # For "b" the second reward is the mean of the batch, 6.
    assert result.rewards.tolist() == [6, 8, 8, 8, 3]
    assert result.valid.tolist() == [True, True, True, False, True]
    batch = torch.tensor([6.0, 8.0, 8.0, 3.0])
    scale = float(batch.std(correction=0)) + 1e-6
    expected = torch.tensor([-1.0, 1.0, (8 - 6.25) / scale, 0, (3 - 6.25) / scale])
    torch.testing.assert_close(result.advantages, expected, atol=1e-5, rtol=0)
    assert not result.zero_std.any()
    assert result.group_std.tolist() == pytest.approx([2**0.5, 0, 0])
    same = PerPromptStatTracker(8, 2).advantages(["a", "a", "b"], torch.tensor([7.1, 7.1, 2.0]))
    assert same.zero_std.tolist() == [True, True, False]
    assert float(same.frac_reward_zero_std) == 0.5


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="must be integers"):
        compute_advantages(REWARDS, GROUPS.float())
    with pytest.raises(ValueError, match="single member"):
        compute_advantages(REWARDS, torch.tensor([1, 1, 1, 2, 2, 3]))
    with pytest.raises(ValueError, match="3 reward_weights for 2 reward functions"):
        compute_advantages(REWARDS, GROUPS, reward_weights=[1, 1, 1])
    with pytest.raises(ValueError, match="all reward_weights are 0"):
        compute_advantages(REWARDS, GROUPS, reward_weights=[0, 0])
    with pytest.raises(ValueError, match="expected \\(rows, reward functions\\)"):
        compute_advantages(REWARDS, GROUPS[:4])
    with pytest.raises(ValueError, match="unknown scale_rewards 'std'"):
        compute_advantages(REWARDS, GROUPS, scale_rewards="std")
    with pytest.raises(ValueError, match="unknown multi_objective_aggregation 'max'"):
        compute_advantages(REWARDS, GROUPS, multi_objective_aggregation="max")
    with pytest.raises(ValueError, match="buffer_size 0 and min_count 2"):
        PerPromptStatTracker(0, 2)
    with pytest.raises(ValueError, match=r"rewards have shape \(3,\); expected \(2,\)"):
        PerPromptStatTracker().update(["a", "b"], torch.ones(3))


def test_a_small_spread_is_divided_by_more_than_itself():
    rewards = torch.tensor([0.0, 2e-4])
    found = compute_advantages(rewards, torch.tensor([0, 0])).advantages
    std = 2e-4 / math.sqrt(2)
    assert found.tolist() == pytest.approx([-1e-4 / (std + 1e-4), 1e-4 / (std + 1e-4)], rel=1e-5)


def test_tracker_sizes():
    tracker = PerPromptStatTracker()
    tracker.update(["a"] * 40, torch.arange(40.0))
    assert list(tracker.history["a"]) == [float(value) for value in range(8, 40)]
    assert tracker.min_count == 16
    assert PerPromptStatTracker(1, 1).buffer_size == 1
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            PerPromptStatTracker(*sizes)


def test_extremes_are_the_best_and_the_worst_of_each_group():
    advantages = torch.tensor([0.1, -2.0, 3.0, 0.2, -1.0, 0.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    valid = torch.ones(12, dtype=torch.bool)
    assert extremes(advantages, valid, 6, 2).nonzero()[:, 0].tolist() == [1, 2, 6, 11]
    assert extremes(advantages, valid, 6, 4).nonzero()[:, 0].tolist() == [1, 2, 3, 4, 6, 7, 10, 11]
    assert extremes(advantages, valid, 6, 6).all()


def test_extremes_of_equal_rewards_are_as_many():
    assert extremes(torch.zeros(8), torch.ones(8, dtype=torch.bool), 4, 2).view(2, 4).sum(dim=1).tolist() == [2, 2]


def test_rows_without_a_reward_are_no_extremes():
    valid = torch.tensor([True, False, True, False, False, False, True, False])
    chosen = extremes(torch.tensor([1.0, 9.0, -1.0, -9.0, 2.0, 2.0, 0.0, 1.0]), valid, 4, 4)
    assert torch.equal(chosen, valid)
    three = torch.tensor([True, True, False, True])
    assert extremes(torch.tensor([1.0, 0.0, -9.0, -1.0]), three, 4, 2).tolist() == [True, False, False, True]
