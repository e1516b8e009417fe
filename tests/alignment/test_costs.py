"""Counted calls: hand-counted numbers for every trainer, sums over resumptions, marks and budgets."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward.alignment.costs import CallCounter
from dina_reward.alignment.monitoring.evaluation import HISTORY_NAME, read_history
from tests.alignment.helpers import algorithm_trainer, closeness, logged, tiny_trainer


# Two generations of 6 rows for back-propagation, else one of 12; five sampling steps. Denoiser calls of rollout, update.
HAND_COUNTED: list[tuple[str, dict[str, Any], int, int]] = [
    ("grpo", {"beta": 0.0}, 12 * 5, 12 * 2),
    ("grpo", {"beta": 0.1}, 12 * (5 + 2), 12 * 2),
    ("grpo", {"beta": 0.1, "keep_per_group": 2}, 12 * (5 + 2), 6 * 2),
    ("grpo", {"beta": 0.1, "guidance_scale": 2.0}, 2 * 12 * (5 + 2), 2 * 12 * 2),
    ("grpo", {"beta": 0.0, "num_iterations": 2, "max_steps": 4}, 12 * 5, 2 * 12 * 2),
    ("ddpo", {"sde_window_size": 4, "train_timestep_fraction": 0.5}, 12 * 5, 12 * 2),
    # Half of the samples train before the first optimizer step, while the old policy is the trained one.
    ("nft", {"num_train_timesteps": 3, "old_policy_decay_rate": 0.0}, 12 * 5 + 6 * 3, 12 * 3),
    ("nft", {"num_train_timesteps": 3, "old_policy_decay_max": 0.0, "beta_kl": 0.1}, 12 * (5 + 3) + 6 * 3, 12 * 3),
    ("online_dpo", {"num_train_timesteps": 3}, 12 * 5 + 4 * 2 * 3, 4 * 2 * 3),
    ("backprop", {"method": "refl"}, 2 * 6 * 4, 2 * 6),
    ("backprop", {"method": "refl", "beta": 0.1}, 2 * 6 * (4 + 1), 2 * 6),
    # The penalty evaluates the second step once more, on an input without a graph.
    ("backprop", {"method": "draft", "draft_k": 2, "beta": 0.1}, 2 * 6 * (3 + 2), 2 * 6 * (2 + 1)),
    ("backprop", {"method": "drtune", "early_stop_range": [3, 4], "beta": 0.1}, 2 * 6 * (2 + 2), 2 * 6 * 2),
]


@pytest.mark.parametrize(("algorithm", "overrides", "rollout", "update"), HAND_COUNTED)
def test_denoiser_calls_by_hand(
    tmp_path: Path, algorithm: str, overrides: dict[str, Any], rollout: int, update: int
) -> None:
    trainer = algorithm_trainer(algorithm, tmp_path, **overrides)
    trainer.train()
    expected = {
        "denoiser_calls": rollout + update,
        "denoiser_calls/rollout": rollout,
        "denoiser_calls/update": update,
        "reward_calls": 12,
        "decoder_calls": 0,
        "judge_calls": 0,
    }
    # The last line is the summary of the run.
    for line in trainer.state.log_history[-2:]:
        assert {name: line[name] for name in expected} == expected
        assert line["train_seconds"] > 0


def test_denoiser_calls_are_the_rows_that_the_denoiser_sees(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, beta=0.1, guidance_scale=2.0)
    seen: list[int] = []
    trainer.policy.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    trainer.train()
    assert trainer.costs.costs().denoiser_calls == sum(seen)


def test_only_samples_that_training_decodes_are_counted(tmp_path: Path) -> None:
    def brightness(images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(1, 2, 3))

    def slow_judge(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3)
        return brightness(images)

    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=[brightness, closeness],
        eval_dataset=["a cat", "a dog"],
        eval_reward_funcs=[slow_judge],
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    trainer.train()
    assert set(logged(trainer, "decoder_calls")) == {0, 12}
    assert set(logged(trainer, "reward_calls")) == {0, 12}
    before, after = read_history(tmp_path / HISTORY_NAME)
    assert before.costs["denoiser_calls"] == before.costs["decoder_calls"] == 0
    assert (after.costs["denoiser_calls"], after.costs["decoder_calls"]) == (12 * 7, 12)
    assert after.costs["train_seconds"] < logged(trainer, "train_runtime")[0] - 0.5


def test_gain_credit_scores_a_state_for_each_trained_step(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, credit="gain")
    trainer.train()
    assert logged(trainer, "reward_calls")[-1] == 12 * (1 + 2)


def test_counts_go_on_when_a_run_is_resumed(tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = tiny_trainer(tmp_path / "straight", **settings)
    straight.train()
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    stored = json.loads((checkpoint / "costs.json").read_text())
    assert stored["calls"] == {"rollout": 60, "update": 24, "reward": 12, "decoder": 0, "judge": 0}
    resumed = tiny_trainer(tmp_path / "resumed", **settings)
    for _ in range(2):  # what this process has counted before does not count
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert logged(resumed, "denoiser_calls")[-3:] == logged(straight, "denoiser_calls")[-3:] == [156, 168, 168]
        assert resumed.costs.costs().seconds > stored["seconds"]
    (checkpoint / "costs.json").unlink()
    with pytest.raises(ValueError, match="costs.json is missing"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_a_budget_ends_the_run_and_marks_evaluate_it(tmp_path: Path) -> None:
    trainer = tiny_trainer(
        tmp_path,
        max_steps=100,
        max_denoiser_calls=400,
        eval_denoiser_calls=150,
        eval_on_start=True,
        eval_dataset=["a cat"],
        save_strategy="steps",
        save_steps=50,
    )
    trainer.train()
    # A generation of two steps makes 84 calls: 84, 168, 252, 336, 420.
    history = read_history(tmp_path / HISTORY_NAME)
    assert [record.costs["denoiser_calls"] for record in history] == [0, 168, 336, 420]
    assert [record.step for record in history] == [0, 4, 8, 10]
    assert trainer.state.global_step == 10
    assert (tmp_path / "checkpoint-10").is_dir()


@pytest.mark.parametrize("name", ["max_denoiser_calls", "eval_denoiser_calls"])
def test_budgets_are_positive_integers(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        tiny_trainer(tmp_path, **{name: 0})


def test_pauses_nest() -> None:
    counter = CallCounter()
    with counter.paused():
        with counter.paused():
            counter.count_denoiser(3)
        counter.count_decodes(3)
    counter.count_rewards(2)
    with torch.no_grad():
        counter.count_denoiser(3, evaluations=2)
    assert counter == CallCounter(rollout=6, update=0, reward=2, decoder=0)
