from __future__ import annotations

import json

import pytest
import torch

from dina_reward.alignment import DiffusionGRPOTrainer, RewardHackingCallback, TightenOnAlarm
from dina_reward.alignment.monitoring.hacking import RewardHacking
from tests.alignment.helpers import PROMPTS, algorithm_trainer, closeness, tiny_config, tiny_pipeline


class Scripted(RewardHackingCallback):
    """Alarms where they are wanted."""

    def __init__(self, alarms):
        super().__init__()
        self.script = list(alarms)

    def find(self, history):
        return [RewardHacking(0, 0, "judge", 0.0, 1.0, 1.0, 0.0, 0.1, 4)] if self.script.pop(0) else []


def judge(latents):
    return [0.0] * len(latents)


def make(directory, alarms, callbacks=(), **overrides):
    settings = {"max_steps": 12, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2, "eval_num_images": 0}
    config = tiny_config(directory, **{**settings, "beta": 0.1, **overrides})
    data = {"eval_dataset": PROMPTS, "eval_reward_funcs": judge, "callbacks": [Scripted(alarms), *callbacks]}
    return DiffusionGRPOTrainer(tiny_pipeline(), closeness, config, PROMPTS, **data)


def test_an_alarm_tightens_and_calm_loosens(tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionGRPOTrainer, "training_step", lambda self, *args: torch.zeros((), requires_grad=True))
    trainer = make(tmp_path, [True, True, False, False, True, False], [TightenOnAlarm(2.0, limit=4.0)])
    seen = []
    inner = trainer.evaluate
    trainer.evaluate = lambda *args, **kwargs: (inner(*args, **kwargs), seen.append(trainer.tightness))[0]
    trainer.train()
    assert seen == [2.0, 4.0, 4.0, 2.0, 4.0, 4.0]
    logged = [line["tightness"] for line in trainer.state.log_history if "tightness" in line]
    # A line comes before its step's evaluation; the first is of a run that was as configured.
    assert logged == [2.0, 4.0, 4.0, 2.0, 4.0]


def test_the_configuration_says_so_in_one_word_and_a_resumed_run_stays_tight(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2, "hacking_tighten": 3.0}
    trainer = make(tmp_path, [True, False], max_steps=4, **saved)
    trainer.train()
    assert trainer.tightness == 3.0
    assert json.loads((tmp_path / "checkpoint-4" / "tightness.json").read_text()) == {"tightness": 3.0, "quiet": 1}
    resumed = make(tmp_path, [False], max_steps=6, **saved)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.tightness == 1.0
    (tmp_path / "checkpoint-6" / "tightness.json").unlink()
    with pytest.raises(ValueError, match="run without TightenOnAlarm"):
        make(tmp_path, [], max_steps=6, **saved).callback_handler.callbacks[-1].load_state(
            str(tmp_path / "checkpoint-6")
        )


@pytest.mark.parametrize(("name", "weight"), [("grpo", "beta"), ("nft", "beta_kl")])
def test_the_penalty_counts_as_much_more(tmp_path, name, weight):
    trainer = algorithm_trainer(name, tmp_path, **{weight: 50.0})
    with torch.no_grad():
        for key, parameter in trainer.policy.denoiser.named_parameters():
            if "lora_B" in key:
                parameter.add_(0.05)
    experience, _ = trainer.make_experience(0)

    def loss():
        output = trainer.step_loss(trainer.model, experience[0], 0)
        return output.loss.item(), float(output.metrics["kl"])

    plain, kl = loss()
    trainer.tightness = 3.0
    tight, _ = loss()
    assert kl > 0
    assert tight - plain == pytest.approx(2 * 50 * kl, rel=1e-3)


def test_clip_ranges_are_divided(tmp_path):
    trainer = make(tmp_path, [], epsilon=1e-3, epsilon_high=4e-3)
    trainer.tightness = 4.0
    settings = trainer._settings()
    assert (settings.epsilon, settings.epsilon_high) == (2.5e-4, 1e-3)


def test_what_cannot_be_tightened_is_refused(tmp_path):
    for arguments, match in (
        ({"factor": 1.0}, "factor must be finite and above 1, got 1.0"),
        ({"factor": float("nan")}, "factor must be finite"),
        ({"factor": 4.0, "limit": 2.0}, "limit must be finite and at least the factor 4.0"),
        ({"calm": 0}, "calm must be at least 1 evaluation"),
    ):
        with pytest.raises(ValueError, match=match):
            TightenOnAlarm(**arguments)
    with pytest.raises(ValueError, match="needs held-out prompts that are judged"):
        DiffusionGRPOTrainer(tiny_pipeline(), closeness, tiny_config(tmp_path), PROMPTS, callbacks=[TightenOnAlarm()])
    assert not algorithm_trainer("nft", tmp_path / "nft").can_tighten
    data = {"eval_dataset": PROMPTS, "eval_reward_funcs": judge, "callbacks": [TightenOnAlarm()]}
    config = tiny_config(tmp_path / "sf", loss_type="policy_gradient", gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="DiffusionGRPOTrainer has nothing to tighten with these settings"):
        DiffusionGRPOTrainer(tiny_pipeline(), closeness, config, PROMPTS, **data)
    with pytest.raises(ValueError, match="there is one among the callbacks; drop either"):
        make(tmp_path / "two", [], [TightenOnAlarm()], hacking_tighten=2.0)
    with pytest.raises(ValueError, match="hacking_tighten"):
        tiny_config(tmp_path, hacking_tighten=0.5)
