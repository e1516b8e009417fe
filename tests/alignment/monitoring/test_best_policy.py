from __future__ import annotations

import shutil

import pytest
import torch

from dina_reward.alignment import BestPolicyCallback, DiffusionGRPOTrainer
from tests.alignment.helpers import PROMPTS, closeness, lora_tensors, tiny_config, tiny_pipeline


class Verdicts:
    """A judge whose means are given in advance."""

    __name__ = "verdicts"

    def __init__(self, values):
        self.values, self.seen = list(values), 0

    def __call__(self, latents):
        value = self.values[self.seen // 2]
        self.seen += 1
        return [value] * len(latents)


def make(directory, values, patience=None, **overrides):
    settings = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    config = tiny_config(directory, eval_num_images=0, **{**settings, **overrides})
    keep = BestPolicyCallback("verdicts", patience)
    data = {"eval_dataset": PROMPTS, "eval_reward_funcs": Verdicts(values), "callbacks": [keep]}
    return DiffusionGRPOTrainer(tiny_pipeline(), closeness, config, PROMPTS, **data), keep


def test_the_best_policy_is_kept_and_restored(tmp_path):
    trainer, keep = make(tmp_path / "run", [1.0, 5.0, 4.0, 3.0])
    trainer.train()
    assert (keep.best_step, keep.best_score, keep.since_best) == (4, 5.0, 2)
    with_best = lora_tensors(trainer)
    with trainer.averaged_policy():
        assert all(torch.equal(tensor, with_best[name]) for name, tensor in lora_tensors(trainer).items())
    other, _ = make(tmp_path / "other", [0.0])
    other.policy.load_weights(str(tmp_path / "run" / "best"))
    assert all(torch.equal(tensor, with_best[name]) for name, tensor in lora_tensors(other).items())
    # What was evaluated, and so is kept, is the moving average of step 4.
    other.policy.load_weights(str(tmp_path / "run" / "checkpoint-4" / "ema"))
    assert all(torch.equal(tensor, with_best[name]) for name, tensor in lora_tensors(other).items())


@pytest.mark.slow
def test_patience_ends_a_run_and_survives_a_resume(tmp_path):
    trainer, keep = make(tmp_path, [1.0, 5.0, 4.0, 3.0], patience=2)
    trainer.train()
    assert trainer.state.global_step == 8
    for step in (6, 8):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    trainer, keep = make(tmp_path, [4.0, 9.0], patience=1)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.state.global_step, keep.best_step, keep.best_score) == (6, 4, 5.0)


def test_what_cannot_be_kept_is_refused(tmp_path):
    with pytest.raises(ValueError, match="patience must be at least 1"):
        BestPolicyCallback("x", 0)
    with pytest.raises(ValueError, match="min_delta"):
        BestPolicyCallback("x", min_delta=-1)
    with pytest.raises(ValueError, match="where held-out prompts are judged"):
        DiffusionGRPOTrainer(
            tiny_pipeline(), closeness, tiny_config(tmp_path), PROMPTS, callbacks=[BestPolicyCallback("x")]
        )
    trainer, keep = make(tmp_path, [1.0] * 4)
    keep.judge = "nobody"
    with pytest.raises(ValueError, match="no score of a judge 'nobody'; it has .*verdicts"):
        trainer.evaluate()
