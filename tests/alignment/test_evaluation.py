from __future__ import annotations

import pytest
import torch
from PIL import Image

from dina_reward.alignment.evaluation import (
    HISTORY_NAME,
    EvaluationRecord,
    append_record,
    picture_grid,
    read_history,
    reward_hacking_alarms,
)
from tests.alignment.helpers import PIXELS, PROMPTS, lora_tensors, tiny_trainer


def record(step: int, reward: float, oracle: float) -> EvaluationRecord:
    return EvaluationRecord(step, {"reward": reward, "oracle": oracle}, {"reward": 0.01, "oracle": 0.01})


def test_training_with_evaluation_writes_history_and_pictures(tmp_path):
    seen = []

    def oracle(images, prompts):
        seen.append((len(images), prompts))
        return {"fit": [float(len(prompt)) for prompt in prompts], "cleanness": [1.0] * len(images)}

    trainer = tiny_trainer(
        tmp_path,
        max_steps=4,
        eval_dataset=PROMPTS,
        evaluators=oracle,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    trainer.train()
    history = read_history(tmp_path / HISTORY_NAME)
    assert [line.step for line in history] == [0, 2, 4]
    assert history[0].metrics["fit"] == pytest.approx(sum(map(len, PROMPTS)) / len(PROMPTS))
    assert set(history[0].metrics) == {"reward", "fit", "cleanness"}
    assert seen[:2] == [(4, PROMPTS[:4]), (2, PROMPTS[4:])]
    assert len({line.metrics["reward"] for line in history}) == 3
    for line in history:
        with Image.open(tmp_path / line.picture) as picture:
            assert picture.size == (2 * (96 + 4) + 4,) * 2
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        f"step-{step:06d}.png" for step in (0, 2, 4)
    ]
    evaluations = [line for line in trainer.state.log_history if "eval_fit" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]


def test_evaluation_is_repeatable_and_uses_the_average(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=4, eval_dataset=PROMPTS, eval_num_images=0, ema_decay=0.99)
    trainer.train()
    trained = lora_tensors(trainer)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_reward"] == second["eval_reward"]
    now = lora_tensors(trainer)
    assert all(torch.equal(now[name], tensor) for name, tensor in trained.items())
    with trainer.averaged_policy():
        averaged = trainer.evaluator.evaluate(PROMPTS, 4).metrics["reward"]
    assert averaged == first["eval_reward"]
    assert trainer.evaluator.evaluate(PROMPTS, 4).metrics["reward"] != averaged


def test_evaluation_without_judges_or_pictures_does_not_decode(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset=PROMPTS, eval_num_images=0)

    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    trainer.policy.pipeline.vae.decode = refuse
    trainer.evaluate()
    assert read_history(tmp_path / HISTORY_NAME)[0].picture is None
    with pytest.raises(ValueError, match="needs held-out prompts"):
        tiny_trainer(tmp_path).evaluate()


def test_bad_evaluators_are_named(tmp_path):
    def judge(images):
        return [1.0]

    with pytest.raises(ValueError, match=r"judge returned shape \(1,\); expected one number per row, \(4,\)"):
        tiny_trainer(tmp_path, eval_dataset=PROMPTS, evaluators=judge).evaluate()


def test_history_replaces_what_a_resumed_run_repeats(tmp_path):
    file = tmp_path / HISTORY_NAME
    for step in (0, 10, 20):
        append_record(file, record(step, step, 1.0))
    history = append_record(file, record(10, 5.0, 0.5))
    assert [line.step for line in history] == [0, 10]
    assert read_history(file) == history
    assert history[-1].metrics["reward"] == 5


def test_alarm_when_the_reward_rises_and_a_judge_falls():
    history = [record(0, 1.0, 0.5), record(10, 2.0, 0.7), record(20, 3.0, 0.6)]
    (message,) = reward_hacking_alarms(history)
    assert "Since step 10 the reward rose from 2 to 3 while held-out oracle fell from 0.7 to 0.6" in message
    assert reward_hacking_alarms(history[:2]) == []
    assert reward_hacking_alarms([*history[:2], record(20, 1.5, 0.6)]) == []  # both fell
    assert reward_hacking_alarms([*history[:2], record(20, 3.0, 0.69)]) == []  # within the error
    assert reward_hacking_alarms(history[:1]) == []


def test_picture_grid():
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, PIXELS, PIXELS)
    grid = picture_grid([red] * 5)
    assert grid.size == (3 * 100 + 4, 2 * 100 + 4)
    assert grid.getpixel((10, 10)) == (255, 0, 0)
    assert grid.getpixel((210, 110)) == (255, 255, 255)
