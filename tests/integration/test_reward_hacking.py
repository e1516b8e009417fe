"""The alarm on the embedded world: it goes off when a weak reward is over-optimised, and not in a sane run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dina_reward.alignment import DiffusionGRPOTrainer
from dina_reward.alignment.monitoring.evaluation import HISTORY_NAME, read_history
from dina_reward.shapes import Oracle, load_pipeline, load_reward
from dina_reward.shapes.alignment import alignment_config, held_out_prompts, training_prompts
from dina_reward.shapes.reward import new_reward


def oracle_quality(images: Any, prompts: list[str]) -> Any:
    """Fit and cleanness in one number."""
    return Oracle()(images.cpu(), prompts).quality


def run(directory: Path, reward_of: Any, **overrides: Any) -> DiffusionGRPOTrainer:
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    config = alignment_config(directory, iterations=12, evaluate_every=3, disable_tqdm=True, **overrides)
    trainer = DiffusionGRPOTrainer(
        pipeline,
        reward_of(pipeline),
        config,
        train_dataset=training_prompts(0),
        eval_dataset=held_out_prompts(),
        eval_reward_funcs=oracle_quality,
    )
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_over_optimising_a_weak_reward_trips_the_alarm(tmp_path: Path) -> None:
    def untrained(pipeline: Any) -> Any:
        return new_reward(pipeline).eval()

    trainer = run(tmp_path, untrained, learning_rate=5e-3, hacking_stop=True)
    history = read_history(tmp_path / HISTORY_NAME)
    assert history[-1].hacking
    assert history[-1].metrics["reward"] > history[0].metrics["reward"]
    assert history[-1].metrics["oracle_quality"] < history[0].metrics["oracle_quality"] - 0.05
    assert trainer.state.global_step == history[-1].step < trainer.args.max_steps


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sane_run_does_not(tmp_path: Path) -> None:
    run(tmp_path, lambda pipeline: load_reward(pipeline=pipeline, share_backbone=True))
    history = read_history(tmp_path / HISTORY_NAME)
    assert [record.hacking for record in history] == [[]] * len(history)
    assert history[-1].metrics["reward"] > history[0].metrics["reward"]
    assert history[-1].metrics["oracle_quality"] > history[0].metrics["oracle_quality"] + 0.03
