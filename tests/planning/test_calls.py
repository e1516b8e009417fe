"""Calls per sample are those that real runs are counted to make."""

from __future__ import annotations

from typing import Any

import pytest

from dina_reward.alignment.config import AlignmentConfig
from dina_reward.planning import calls_of
from dina_reward.search import SearchDistillationConfig
from tests.alignment.helpers import ALGORITHMS, tiny_config
from tests.alignment.test_costs import HAND_COUNTED


def passes(scale: float) -> int:
    return 2 if scale > 1 else 1


def config_of(config_class: Any, **settings: Any) -> Any:
    """What of the tiny settings the class has."""
    known = config_class.__dataclass_fields__
    return tiny_config(
        "out", lambda **values: config_class(**{k: v for k, v in values.items() if k in known}), **settings
    )


@pytest.mark.parametrize(("algorithm", "overrides", "rollout", "update"), HAND_COUNTED)
def test_calls_are_those_of_the_counter(algorithm: str, overrides: dict[str, Any], rollout: int, update: int) -> None:
    _, config_class, settings = ALGORITHMS[algorithm]
    calls = calls_of(config_of(config_class, **{**settings, **overrides}), passes)
    assert (12 * calls.rollout, 12 * calls.update) == (rollout, update)


def test_steps_drawn_at_random_count_by_their_mean() -> None:
    _, config_class, settings = ALGORITHMS["backprop"]
    calls = calls_of(config_of(config_class, **settings, num_inference_steps=40, grad_step_range=[30, 40]), passes)
    assert (calls.rollout, calls.update, calls.through_reward) == (34.5, 1, True)


def test_gain_credit_scores_every_trained_step() -> None:
    assert calls_of(tiny_config("out", credit="gain"), passes).reward == 3


def test_a_search_costs_its_budget() -> None:
    settings = {"num_generations": 2, "search_budget": 8, "num_train_timesteps": 3}
    calls = calls_of(config_of(SearchDistillationConfig, **settings), passes)
    assert (calls.rollout, calls.update, calls.reward) == (5 * 4, 3, 4)


def test_other_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="no calls are known for AlignmentConfig"):
        calls_of(config_of(AlignmentConfig), passes)


def test_an_old_policy_that_lags_is_evaluated_in_every_loss() -> None:
    _, config_class, settings = ALGORITHMS["nft"]
    calls = calls_of(config_of(config_class, **{**settings, "num_train_timesteps": 3}), passes)
    assert (calls.rollout, calls.update) == (5 + 3, 3)


def test_samples_that_are_left_out_make_room_for_joint_levels() -> None:
    _, config_class, settings = ALGORITHMS["nft"]
    few = {"num_train_timesteps": 4, "keep_per_group": 2, "per_device_train_batch_size": 8, "beta_kl": 0.1}
    calls = calls_of(config_of(config_class, **{**settings, **few}), passes)
    # Half of the rows, two levels at a time, each with an old policy and a reference.
    assert (calls.rollout, calls.update, calls.graphs) == (5 + 2 * 2, 2, 1)
    assert (calls.passes, calls.gradient_passes) == (5 + 2 * 2, 2)
