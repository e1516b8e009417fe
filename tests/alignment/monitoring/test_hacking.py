from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from dina_reward.alignment.monitoring import hacking
from dina_reward.alignment.monitoring.hacking import (
    SCORES_NAME,
    PromptScores,
    RewardHackingCallback,
    append_line,
    find_reward_hacking,
    read_lines,
)


PROMPTS = 40
DIFFICULTY = torch.linspace(-3, 3, PROMPTS)  # how much prompts differ, far more than evaluations do


def evaluation(step: int, reward: float, judge: float, noise: float = 0.0, seed: int = 0, **options) -> PromptScores:
    generator = torch.Generator().manual_seed(seed)
    wobble = noise * torch.randn(2, PROMPTS, generator=generator)
    rewards, judged = reward + DIFFICULTY + wobble[0], judge + DIFFICULTY + wobble[1]
    return PromptScores(step, {"reward": rewards.tolist(), "oracle": judged.tolist()}, **options)


def history(rewards, judges, noise=0.1, **options) -> list[PromptScores]:
    pairs = zip(rewards, judges, strict=True)
    return [evaluation(10 * i, r, j, noise, seed=i, **options) for i, (r, j) in enumerate(pairs)]


def test_a_rising_reward_and_a_falling_judge_trip_the_alarm():
    records = history([1.0, 2.0, 3.0], [0.5, 0.7, 0.5])
    (alarm,) = find_reward_hacking(records)
    assert (alarm.step, alarm.since_step, alarm.judge, alarm.num_prompts) == (20, 10, "oracle", PROMPTS)
    assert alarm.reward_before == pytest.approx(2, abs=0.1)
    assert alarm.reward_after == pytest.approx(3, abs=0.1)
    assert alarm.judge_before == pytest.approx(0.7, abs=0.1)
    # The spread of the prompts, 1.8, is not part of the error: 0.1 sqrt(2) / sqrt(40) is.
    assert alarm.standard_error == pytest.approx(0.1 * math.sqrt(2 / PROMPTS), rel=0.3)
    assert "Since step 10 the reward rose from 1.975 to 2.996 while held-out oracle fell from 0.693" in alarm.message


@pytest.mark.parametrize(
    ("rewards", "judges"),
    [
        ([1.0, 2.0, 3.0], [0.5, 0.6, 0.7]),  # both rise
        ([3.0, 2.0, 1.0], [0.7, 0.6, 0.5]),  # both fall
        ([3.0, 2.0, 1.0], [0.5, 0.6, 0.7]),
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.49]),  # within its noise, 0.022
    ],
)
def test_no_alarm(rewards, judges):
    assert find_reward_hacking(history(rewards, judges)) == []


@pytest.mark.parametrize("rise", [0.02, 0.5, 3.0])
def test_any_rise_of_the_reward_counts(rise):
    (alarm,) = find_reward_hacking(history([1.0, 1.0 + rise], [0.7, 0.5], noise=1e-4))
    assert alarm.reward_after - alarm.reward_before == pytest.approx(rise, abs=1e-3)


def test_a_reward_that_applies_nowhere_is_no_rise():
    records = history([1.0, 2.0], [0.7, 0.5])
    for nowhere in range(2):
        missing = [
            PromptScores(r.step, {**r.scores, "reward": [None] * PROMPTS} if i == nowhere else r.scores)
            for i, r in enumerate(records)
        ]
        assert find_reward_hacking(missing) == []


def test_nothing_to_compare_with():
    assert find_reward_hacking([]) == []
    assert find_reward_hacking(history([1.0], [1.0])) == []


def test_only_the_window_counts():
    records = history([1.0, 2.0, 3.0, 4.0, 5.0], [0.9, 0.5, 0.5, 0.5, 0.5])
    assert [alarm.since_step for alarm in find_reward_hacking(records[:4], window=3)] == [0]
    assert find_reward_hacking(records, window=3) == []
    assert [alarm.since_step for alarm in find_reward_hacking(records, window=4)] == [0]


def test_a_slow_fall_is_measured_from_the_best():
    """Each step of 0.03 is within the noise; three of them are not."""
    records = history([1.0, 2.0, 3.0, 4.0], [0.5, 0.47, 0.44, 0.41])
    assert find_reward_hacking(records[:2], threshold=3) == []
    assert find_reward_hacking(records[2:], threshold=3) == []
    assert [alarm.since_step for alarm in find_reward_hacking(records, threshold=3)] == [0]


def test_a_fall_that_is_the_same_everywhere():
    exact = history([1.0, 2.0], [0.5, 0.4], noise=0.0)
    assert [alarm.judge for alarm in find_reward_hacking(exact)] == ["oracle"]
    assert find_reward_hacking(history([1.0, 2.0], [0.5, 0.5 - 1e-8], noise=0.0)) == []  # rounding


def test_evaluations_of_other_prompts_are_not_compared():
    before, after = evaluation(0, 1.0, 0.9, protocol="a"), evaluation(10, 2.0, 0.5, protocol="b")
    assert find_reward_hacking([before, after]) == []
    assert len(find_reward_hacking([PromptScores(0, before.scores, "b"), after])) == 1
    longer = PromptScores(0, {name: [*values, 9.0] for name, values in before.scores.items()}, "b")
    assert find_reward_hacking([longer, after]) == []


def test_scores_that_do_not_apply_are_left_out_of_the_pairs():
    records = history([1.0, 2.0], [0.9, 0.5])
    for record, missing in zip(records, (0, 1), strict=True):
        record.scores["oracle"][missing] = None
    (alarm,) = find_reward_hacking(records)
    assert alarm.num_prompts == PROMPTS - 2
    records[1].scores["oracle"][2:] = [None] * (PROMPTS - 2)
    assert find_reward_hacking(records) == []


def test_parts_of_the_reward_are_not_judges():
    records = history([1.0, 2.0], [0.9, 0.5])
    for record in records:
        record.scores["rewards/part"] = record.scores.pop("oracle")
    assert find_reward_hacking(records) == []


@pytest.mark.parametrize("prompts", [8, 40])
def test_false_alarms_are_as_rare_as_the_threshold_says(prompts):
    """Nothing changes but noise, while the reward rises: at most 2.3 % of evaluations may give an alarm."""
    generator = torch.Generator().manual_seed(0)
    trials = 2000
    noise = torch.randn(trials, 4, prompts, generator=generator, dtype=torch.float64)
    alarms = 0
    for trial in noise.tolist():
        records = [PromptScores(i, {"reward": [float(i)] * prompts, "j": scores}) for i, scores in enumerate(trial)]
        alarms += bool(find_reward_hacking(records))
    # Standard error 0.33 %; the best of three, correlated as they are, makes fewer than Bonferroni allows for.
    assert 0.010 < alarms / trials < 0.023 + 2 * 0.0033


def test_callback_stops_the_run_and_calls_the_hook(tmp_path, caplog):
    heard = []
    callback = RewardHackingCallback(stop=True, on_reward_hacking=heard.append)
    arguments, state, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    callback.report(callback.find(history([1.0, 2.0], [0.5, 0.5])))
    assert not callback.on_evaluate(arguments, state, control).should_training_stop
    alarms = callback.find(history([1.0, 2.0], [0.9, 0.5]))
    with caplog.at_level(logging.WARNING):
        callback.report(alarms, is_main_process=False)
    assert heard == []
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        callback.report(alarms)
    assert heard == alarms
    assert "Reward hacking? Since step 0" in caplog.text
    assert callback.on_evaluate(arguments, state, control).should_training_stop
    callback.stop, control.should_training_stop = False, False
    assert not callback.on_evaluate(arguments, state, control).should_training_stop


def test_settings_of_the_callback_have_bounds():
    callback = RewardHackingCallback(window=1, threshold=0.1)
    assert (callback.window, callback.threshold) == (1, 0.1)
    for window, threshold in ((0, 2.0), (3, 0.0), (3, -1.0), (3, math.nan)):
        with pytest.raises(ValueError, match="must be at least 1 and threshold"):
            RewardHackingCallback(window=window, threshold=threshold)


def test_callback_passes_its_settings_on():
    records = history([1.0, 2.0, 3.0], [0.6, 0.5, 0.5])
    assert len(RewardHackingCallback(window=2).find(records)) == 1
    assert RewardHackingCallback(window=1).find(records) == []
    assert RewardHackingCallback(window=2, threshold=20.0).find(records) == []
    with pytest.raises(ValueError, match="window 0 must be at least 1"):
        RewardHackingCallback(window=0)
    with pytest.raises(ValueError, match="threshold 0 above 0"):
        RewardHackingCallback(threshold=0)


def test_scores_survive_a_resume(tmp_path):
    file = tmp_path / SCORES_NAME
    records = history([1.0, 2.0, 3.0], [0.9, 0.8, 0.7], protocol="p")
    records[0].scores["oracle"][0] = None
    for record in records:
        append_line(file, record)
    assert read_lines(file, PromptScores) == records
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    repeated = evaluation(10, 2.5, 0.6, protocol="p")
    assert append_line(file, repeated) == [records[0], repeated]
    assert read_lines(tmp_path / "none", PromptScores) == []


def test_the_critical_value_is_that_of_student():
    """One-sided 2.275 % and 0.135 % points of Student's distribution, of 10 and of 30 degrees of freedom."""
    assert hacking._critical(2.0, 1, 11) == pytest.approx(2.2837, abs=0.01)
    assert hacking._critical(2.0, 1, 31) == pytest.approx(2.0868, abs=0.001)
    assert hacking._critical(3.0, 1, 31) == pytest.approx(3.2703, abs=0.003)


def test_the_standard_error_is_that_of_a_mean():
    before, after = [0.0] * 9, [-1.0, -3.0] * 4 + [-2.0]
    records = [
        PromptScores(step, {"reward": [float(step)] * 9, "judge": scores})
        for step, scores in ((0, before), (1, after))
    ]
    (alarm,) = find_reward_hacking(records)
    assert alarm.standard_error == pytest.approx(1 / 3)


@pytest.mark.parametrize(("prompts", "alarms"), [(2, 0), (3, 1)])
def test_three_prompts_are_the_least(prompts: int, alarms: int) -> None:
    rows = [float(row) for row in range(prompts)]
    before = PromptScores(0, {"reward": rows, "oracle": rows})
    after = PromptScores(10, {"reward": [row + 1 for row in rows], "oracle": [row - 1 for row in rows]})
    assert len(find_reward_hacking([before, after])) == alarms


def test_the_critical_value_by_hand() -> None:
    # z = 2 at 4 degrees of freedom: 2 + (8 + 2) / 16 + (160 + 128 + 6) / (96 x 16)
    assert hacking._critical(2.0, 1, 5) == pytest.approx(2.81640625, rel=1e-9)


def test_a_reward_that_stands_still_is_not_hacked() -> None:
    rows = [0.0, 1.0, 2.0, 3.0]
    before = PromptScores(0, {"reward": rows, "oracle": rows})
    after = PromptScores(10, {"reward": rows, "oracle": [row - 1 for row in rows]})
    assert find_reward_hacking([before, after]) == []


def test_two_standard_errors_are_the_default() -> None:
    assert RewardHackingCallback().threshold == 2.0
