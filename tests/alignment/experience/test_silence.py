from __future__ import annotations

import logging
import math

import pytest
import torch

from dina_reward.alignment.experience.silence import PATIENCE, SilentRewards
from tests.alignment.helpers import logged, tiny_trainer


NOTHING = torch.full((4, 2), math.nan)


def one_of_two(value: float) -> torch.Tensor:
    scores = NOTHING.clone()
    scores[2, 1] = value
    return scores


def test_a_silent_reward_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    rewards = SilentRewards(["quiet", "loud"], [1.0, 1.0])
    with caplog.at_level(logging.WARNING):
        for generation in range(2 * PATIENCE):
            assert rewards.check(generation, one_of_two(1.0))
    assert caplog.text.count("The reward quiet applies to none of the 4 samples of generation 0") == 1
    assert "loud" not in caplog.text


def test_a_run_without_any_reward_stops_unless_one_speaks_in_between() -> None:
    rewards = SilentRewards(["a", "b"], [1.0, 1.0])
    for generation in range(PATIENCE - 1):
        assert not rewards.check(generation, NOTHING)
    assert rewards.check(PATIENCE - 1, one_of_two(0.0))
    for generation in range(PATIENCE - 1):
        rewards.check(generation, NOTHING)
    with pytest.raises(ValueError, match=f"no reward function has applied to any sample of the last {PATIENCE} gen"):
        rewards.check(0, NOTHING)


def test_a_reward_without_weight_does_not_count() -> None:
    assert not SilentRewards(["a", "b"], [1.0, 0.0]).check(0, one_of_two(1.0))


def test_a_trainer_warns_and_logs_no_number(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = tiny_trainer(tmp_path, reward_funcs=lambda latents: None)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("applies to none of the 12 samples of generation 0") == 1
    assert math.isnan(logged(trainer, "reward")[0])
