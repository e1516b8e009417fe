from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from dina_reward.alignment.experience.rewards import RewardSet
from dina_reward.alignment.monitoring.evaluation import (
    HISTORY_NAME,
    EvaluationRecord,
    HeldOutEvaluator,
    read_history,
)
from dina_reward.alignment.monitoring.hacking import (
    SCORES_NAME,
    PromptScores,
    RewardHackingCallback,
    append_line,
    read_lines,
)
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.prompts import PromptTable
from dina_reward.alignment.sampling.samplers import build_sampler
from dina_reward.reward_functions import RewardError, optional_reward
from tests.alignment.helpers import PIXELS, PROMPTS, closeness, lora_tensors, tiny_pipeline, tiny_trainer


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(tiny_pipeline(), rank=2, alpha=4, max_sequence_length=8)


def evaluator(policy, output_dir, *judges, reward_funcs=(closeness,), weights=None, steps=2, **overrides):
    rewards = RewardSet(
        list(reward_funcs),
        {"noise_level": [0.4]},
        lambda latents: policy.family.decode_latents(policy.pipeline, latents),
    )
    settings = {
        "reward_weights": weights or [1.0] * len(reward_funcs),
        "eval_reward_funcs": judges,
        "output_dir": str(output_dir),
        "sampler": build_sampler(policy.pipeline.scheduler, steps),
        "latent_shape": policy.latent_shape(PIXELS, PIXELS),
        "guidance_scale": 1.0,
        "batch_size": 4,
        "num_images": 0,
        "seed": 7,
        "accelerator": Accelerator(cpu=True),
    }
    return HeldOutEvaluator(policy, rewards, **{**settings, **overrides})


def test_training_with_evaluation_writes_history_and_pictures(tmp_path):
    seen = []

    def oracle(images, prompts):
        seen.append((len(images), prompts))
        return {"fit": [float(len(prompt)) for prompt in prompts], "cleanness": [1.0] * len(images)}

    trainer = tiny_trainer(
        tmp_path,
        max_steps=4,
        eval_dataset=PROMPTS,
        eval_reward_funcs=oracle,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    trainer.train()
    history = read_history(tmp_path / HISTORY_NAME)
    assert [line.step for line in history] == [0, 2, 4]
    assert history[0].metrics["fit"] == pytest.approx(sum(map(len, PROMPTS)) / len(PROMPTS))
    assert set(history[0].metrics) - {"hacking_alarm"} == {"reward", "fit", "cleanness"}
    assert seen[:2] == [(4, PROMPTS[:4]), (2, PROMPTS[4:])]
    assert len({line.metrics["reward"] for line in history}) == 3
    for line in history:
        with Image.open(tmp_path / line.picture) as picture:
            assert picture.width == 2 * (96 + 4) + 4
            assert picture.height > picture.width  # captions
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        f"step-{step:06d}.png" for step in (0, 2, 4)
    ]
    evaluations = [line for line in trainer.state.log_history if "eval_fit" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4]


def test_a_resumed_run_is_not_evaluated_at_its_start_again(tmp_path):
    settings = {
        "max_steps": 4,
        "eval_strategy": "no",
        "eval_on_start": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    tiny_trainer(tmp_path, eval_dataset=PROMPTS[:2], eval_num_images=0, **settings).train()
    resumed = tiny_trainer(tmp_path, eval_dataset=PROMPTS[:2], eval_num_images=0, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [line.step for line in read_history(tmp_path / HISTORY_NAME)] == [0]
    assert resumed.args.eval_on_start


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


def refuse(*args, **kwargs):
    raise AssertionError("decoded")


def test_nothing_is_decoded_unless_someone_looks(policy, tmp_path, monkeypatch):
    def judge(latents, **others):
        return [len(others["seed"])] * len(latents)

    monkeypatch.setattr(policy.pipeline.vae, "decode", refuse)
    record = evaluator(policy, tmp_path, judge).evaluate(PROMPTS, 3)
    assert record.picture is None
    assert record.metrics["judge"] == pytest.approx((4 * 4 + 2 * 2) / 6)
    with pytest.raises(AssertionError, match="decoded"):
        evaluator(policy, tmp_path, lambda images: images).evaluate(PROMPTS, 3)
    with pytest.raises(AssertionError, match="decoded"):
        evaluator(policy, tmp_path, num_images=1).evaluate(PROMPTS, 3)


def test_only_the_drawn_images_are_decoded(policy, tmp_path):
    counts, decode = [], policy.family.decode_latents
    family = SimpleNamespace(decode_latents=lambda p, latents: counts.append(len(latents)) or decode(p, latents))
    watched = evaluator(policy, tmp_path, num_images=5)
    watched.policy = SimpleNamespace(
        **{name: getattr(policy, name) for name in ("encode", "encode_negative", "bind", "storage_dtype", "pipeline")},
        family=family,
    )
    watched.evaluate(PROMPTS, 0)
    assert counts == [4, 1]


def test_judges_get_images_and_not_the_settings_of_the_reward(policy, tmp_path):
    seen = {}

    def pixels(images, prompts, noise_level="own"):
        seen["pixels"] = (images.shape, images.dtype, prompts, noise_level)
        return images.mean(dim=(1, 2, 3))

    def latent(latents, seed):
        seen.setdefault("seeds", []).extend(seed)
        return [None if prompt == 1 else float(prompt) for prompt in range(len(latents))]

    record = evaluator(policy, tmp_path, pixels, latent, batch_size=6).evaluate(PROMPTS, 0)
    assert seen["pixels"] == ((6, 3, PIXELS, PIXELS), torch.float32, PROMPTS, "own")
    assert len(set(seen["seeds"])) == 6
    assert record.metrics["latent"] == pytest.approx((0 + 2 + 3 + 4 + 5) / 5)
    assert record.standard_errors["latent"] == pytest.approx(math.sqrt(2.96 / 5))
    (scores,) = read_lines(tmp_path / SCORES_NAME, PromptScores)
    assert scores.scores["latent"] == [0, None, 2, 3, 4, 5]
    assert record.metrics["reward"] == pytest.approx(sum(scores.scores["reward"]) / 6)


def test_pixel_rewards_share_the_decoded_images(policy, tmp_path, monkeypatch):
    decoded, decode = [], policy.family.decode_latents
    monkeypatch.setattr(policy.family, "decode_latents", lambda *args: decoded.append(decode(*args)) or decoded[-1])

    def brightness(images):
        assert torch.equal(images, decoded[0].float())
        return images.mean(dim=(1, 2, 3))

    both = evaluator(
        policy, tmp_path, brightness, reward_funcs=[brightness, closeness], weights=[2.0, 0.0], batch_size=6
    )
    record = both.evaluate(PROMPTS, 0)
    assert len(decoded) == 1
    assert record.metrics["reward"] == pytest.approx(2 * record.metrics["brightness"])
    assert set(record.metrics) == {"reward", "rewards/brightness", "rewards/closeness", "brightness"}


def test_rewards_that_do_not_apply_count_as_their_mean(policy, tmp_path):
    def first(prompts):
        return [1.0, 3.0, None, None, 2.0, None]

    def second(prompts):
        return [10.0, 10.0, 20.0, 40.0, 20.0, None]

    held_out = evaluator(policy, tmp_path, reward_funcs=[first, second], weights=[1.0, 0.5], batch_size=6)
    record = held_out.evaluate(PROMPTS, 0)
    (scores,) = read_lines(tmp_path / SCORES_NAME, PromptScores)
    assert scores.scores["reward"] == [6, 8, 12, 22, 12, None]
    assert record.metrics["reward"] == 12
    assert record.metrics["rewards/first"] == 2
    assert record.metrics["rewards/second"] == 20


def test_resolution_steps_and_guidance_are_those_of_the_evaluation(policy, tmp_path):
    def report(latents):
        assert latents.shape[1:] == (16, 4, 8)
        return closeness(latents)

    def score(**overrides):
        return evaluator(policy, tmp_path, **overrides).evaluate(PROMPTS[:2], 0).metrics["reward"]

    evaluator(policy, tmp_path, report, latent_shape=policy.latent_shape(PIXELS, 2 * PIXELS)).evaluate(PROMPTS[:2], 0)
    plain = score()
    assert score() == plain
    assert abs(score(guidance_scale=5.0) - plain) > 1e-6
    assert abs(score(steps=3) - plain) > 1e-6
    assert policy.guidance_scale == 1
    protocols = {evaluator(policy, tmp_path, guidance_scale=scale)._protocol(PROMPTS) for scale in (1.0, 5.0)}
    assert len(protocols) == 2


def test_batch_size_does_not_change_scores(policy, tmp_path):
    together = evaluator(policy, tmp_path, batch_size=6).evaluate(PROMPTS, 0).metrics["reward"]
    assert evaluator(policy, tmp_path, batch_size=1).evaluate(PROMPTS, 0).metrics["reward"] == pytest.approx(
        together, rel=1e-5
    )


def test_all_ranks_make_the_same_number_of_batches(policy, tmp_path):
    held_out = evaluator(policy, tmp_path, batch_size=2)
    batches = []
    for rank in range(3):
        held_out.accelerator = SimpleNamespace(num_processes=3, process_index=rank)
        batches.append(list(held_out._batches(7)))
    assert batches == [[[0, 3], [6]], [[1, 4], []], [[2, 5], []]]
    held_out.accelerator = Accelerator(cpu=True)
    assert held_out._evaluate_batch(PromptTable(PROMPTS, "eval_dataset"), []) == ([], [])


def test_bad_judges_are_named(policy, tmp_path):
    def judge(images):
        return [1.0]

    def infinite(prompts):
        return {"fit": [math.inf] * len(prompts)}

    def thief(prompts):
        return {"reward": [1.0] * len(prompts)}

    def other(prompts):
        return {"thief": [1.0] * len(prompts)}

    async def remote(images):
        return None

    with pytest.raises(RewardError, match=r"judge returned shape \(1,\); expected one number per row, \(4,\)"):
        evaluator(policy, tmp_path, judge).evaluate(PROMPTS, 0)
    with pytest.raises(RewardError, match=r"infinite\['fit'\] returned inf for row 0 of 4.*prompt 'a cat' noise seed"):
        evaluator(policy, tmp_path, infinite).evaluate(PROMPTS, 0)
    with pytest.raises(ValueError, match="judge thief may not call a score 'reward'"):
        evaluator(policy, tmp_path, thief).evaluate(PROMPTS, 0)
    with pytest.raises(ValueError, match="two held-out judges give a score 'thief', one of them other"):
        evaluator(policy, tmp_path, named("thief"), other).evaluate(PROMPTS, 0)
    with pytest.raises(ValueError, match="remote is an async function"):
        evaluator(policy, tmp_path, remote)
    with pytest.raises(ValueError, match="no prompts"):
        evaluator(policy, tmp_path).evaluate([], 0)


def named(name, scores=lambda prompts: [1.0] * len(prompts)):
    def judge(prompts):
        return scores(prompts)

    judge.__name__ = name
    return judge


def test_optional_judges_may_fail(policy, tmp_path, caplog):
    def down(prompts):
        raise OSError("down")

    held_out = evaluator(policy, tmp_path, optional_reward(named("remote", down)), named("local"))
    with caplog.at_level(logging.WARNING):
        record = held_out.evaluate(PROMPTS, 0)
    assert set(record.metrics) == {"reward", "local"}
    assert held_out.failures == {"remote": 6}
    assert caplog.text.count("remote raised OSError: down") == 1


def test_falling_judge_trips_the_alarm_and_is_remembered(policy, tmp_path, caplog):
    level, heard = {"reward": 0.0, "judge": 1.0}, []

    def reward(prompts):
        return [level["reward"] + len(prompt) for prompt in prompts]

    def judge(prompts):
        return [level["judge"] * len(prompt) for prompt in prompts]

    def held_out():
        hacking = RewardHackingCallback(on_reward_hacking=heard.append)
        return evaluator(policy, tmp_path, judge, reward_funcs=[reward], hacking=hacking)

    assert held_out().evaluate(PROMPTS, 0).metrics["hacking_alarm"] == 0
    level.update(reward=1.0, judge=0.5)
    resumed = held_out()  # knows the first evaluation from the file alone
    with caplog.at_level(logging.WARNING):
        record = resumed.evaluate(PROMPTS, 10)
    assert record.metrics["hacking_alarm"] == 1
    (alarm,) = heard
    assert (alarm.judge, alarm.since_step, alarm.step, alarm.num_prompts) == ("judge", 0, 10, 6)
    assert resumed.hacking.alarms == [alarm]
    assert "Reward hacking? Since step 0" in caplog.text
    history = read_history(tmp_path / HISTORY_NAME)
    assert history[1] == record
    assert history[1].hacking[0]["judge"] == "judge"
    level.update(reward=2.0, judge=1.0)
    assert resumed.evaluate(PROMPTS, 20).metrics["hacking_alarm"] == 0
    assert resumed.hacking.alarms == []


def test_pictures_have_captions_and_go_to_the_hook(policy, tmp_path):
    heard = []
    held_out = evaluator(policy, tmp_path, num_images=2, on_picture=lambda *arguments: heard.append(arguments))
    record = held_out.evaluate(PROMPTS, 12)
    ((step, picture, caption),) = heard
    assert step == 12
    assert caption == f"step 12: reward {record.metrics['reward']:.4g}"
    with Image.open(tmp_path / record.picture) as saved:
        assert saved.size == picture.size
    assert picture.height > 96 + 2 * 4 + 2 * 10  # prompt and score


def test_history_replaces_what_a_resumed_run_repeats(tmp_path):
    file = tmp_path / HISTORY_NAME
    for step in (0, 10, 20):
        append_line(file, EvaluationRecord(step, {"reward": float(step)}))
    history = append_line(file, EvaluationRecord(10, {"reward": 5.0}, hacking=[{"judge": "oracle"}]))
    assert [line.step for line in history] == [0, 10]
    assert read_history(file) == history
    assert history[-1].metrics["reward"] == 5


def test_histories_without_the_later_fields_are_read(tmp_path):
    file = tmp_path / HISTORY_NAME
    file.write_text(json.dumps({"step": 1, "metrics": {"reward": 1.0}, "standard_errors": {}, "picture": None}) + "\n")
    assert read_history(file) == [EvaluationRecord(1, {"reward": 1.0})]
