"""What a search leaves behind is what trainers take."""

from __future__ import annotations

from pathlib import Path

import pytest

from dina_reward.search import search
from dina_reward.shapes.prompts import sample_prompts
from dina_reward.shapes.shipped import load_pipeline
from tests.alignment.trainers.forward_helpers import dpo_trainer, embedded_run, first_channel


@pytest.mark.slow
def test_pairs_that_a_search_left_teach_the_generator(tmp_path: Path) -> None:
    run = embedded_run()
    prompts = sample_prompts(12, "train", seed=0)
    found = search(
        load_pipeline(),
        first_channel,
        prompts,
        method="best_of_n",
        budget=8,
        num_inference_steps=4,
        batch_size=96,
        return_pairs=True,
    )
    rows = [pair.training_row() for pair in found.pairs]
    assert len(rows) == 12 * 4  # the better half of each eight against the worse
    settings = {**run, "num_generations": 2, "per_device_train_batch_size": 24, "beta_dpo": 30.0, "max_steps": 6}
    trainer = dpo_trainer(tmp_path, **{**settings, "prompts": rows})
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    assert trainer.evaluate()["eval_reward"] > before + 0.02
