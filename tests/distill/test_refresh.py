"""The living reward, on the tiny pipeline with a reward that shares its backbone, and a judge of its latents."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward.checkpoints import atomic
from dina_reward.distill import (
    DriftSettings,
    JudgeLabeller,
    JudgeLimits,
    LabelSettings,
    RefreshSettings,
    RewardRefresh,
)
from dina_reward.distill.refresh_training import ReplayedPairs, undisturbed
from tests.alignment.helpers import (
    ALGORITHMS,
    PROMPTS,
    UNET,
    algorithm_trainer,
    logged,
    lora_tensors,
    tiny_config,
    tiny_pipeline,
)
from tests.training.tiny_reward import separable_pairs, tiny_reward


AUDIT = ["audit one", "audit two"]
SETTINGS = RefreshSettings(
    every=1, budget=12, audit_budget=8, steps=2, batch_size=4, learning_rate=3e-3, replay=0.5, tolerance=1.0
)


class Shade:
    """Scores latents by the mean of their first channels, and counts the questions."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.asked, self.fail_after = 0, fail_after

    def __call__(self, latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        if self.fail_after is not None and self.asked >= self.fail_after:
            raise RuntimeError("out of order")
        self.asked += len(prompts)
        return latents[:, :4].flatten(1).mean(1)


def labeller(judge: Any) -> JudgeLabeller:
    settings = LabelSettings(group_size=2, candidates=3, samples_per_shard=8)
    return JudgeLabeller(judge, limits=JudgeLimits(batch_size=4, retries=0), settings=settings)


def make(
    directory: Path, judge: Any, settings: RefreshSettings = SETTINGS, name: str = "grpo", **overrides: Any
) -> Any:
    """A trainer with a refreshed reward; two generations of two optimizer steps, or as `max_steps` says."""
    trainer_class, config_class, own = ALGORITHMS[name]
    known = config_class.__dataclass_fields__
    pipeline = tiny_pipeline()
    reward = tiny_reward(pipeline=pipeline, share_backbone=True).eval()
    values = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "beta": 0.0, "seed": 3, **own, **overrides}
    config = tiny_config(
        directory, cls=lambda **v: config_class(**{k: x for k, x in v.items() if k in known}), **values
    )
    refresh = RewardRefresh(labeller(judge), reward, settings, AUDIT)
    return trainer_class(pipeline, reward, config, PROMPTS, callbacks=[refresh]), refresh


def reward_tensors(refresh: RewardRefresh) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in refresh.reward.model.trainable_state().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An uninterrupted run."""
    directory = tmp_path_factory.mktemp("whole")
    judge = Shade()
    trainer, refresh = make(directory, judge)
    before = reward_tensors(refresh)
    trainer.train()
    return {
        "directory": directory,
        "trainer": trainer,
        "refresh": refresh,
        "judge": judge,
        "before": before,
        "lora": lora_tensors(trainer),
        "reward": reward_tensors(refresh),
    }


def test_refreshes_train_the_reward_and_are_logged(whole: dict[str, Any]) -> None:
    trainer, refresh, directory = whole["trainer"], whole["refresh"], whole["directory"]
    assert [record.step for record in refresh.records] == [2, 4]  # none after the last step
    assert all(
        record.accepted and record.reasons == [f"generation {i + 1}"] for i, record in enumerate(refresh.records)
    )
    assert any(not torch.equal(tensor, whole["before"][name]) for name, tensor in whole["reward"].items())
    assert refresh.judge_calls == whole["judge"].asked == logged(trainer, "judge_calls")[-1]
    assert [record.replayed for record in refresh.records] == [0, round(0.5 * refresh.records[1].pairs)]
    for name in ("refresh/audit_accuracy/before", "refresh/audit_accuracy/after", "refresh/margin_flips"):
        assert all(0 <= value <= 1 for value in logged(trainer, name))
        assert len(logged(trainer, name)) == 2
    round_one = directory / "refresh" / "round-001"
    assert json.loads((round_one / "record.json").read_text())["number"] == 1
    assert (round_one / "reward" / "head.safetensors").is_file()
    prompts = json.loads((round_one / "audit" / "samples.json").read_text())["prompts"]
    assert set(prompts) <= set(AUDIT)
    assert not set(json.loads((round_one / "labels" / "samples.json").read_text())["prompts"]) & set(AUDIT)
    assert refresh.reward.shares_backbone


def check_same(trainer: Any, refresh: RewardRefresh, whole: dict[str, Any]) -> None:
    for name, tensor in reward_tensors(refresh).items():
        assert torch.equal(tensor, whole["reward"][name]), name
    for name, tensor in lora_tensors(trainer).items():
        assert torch.equal(tensor, whole["lora"][name]), name
    assert refresh.records == whole["refresh"].records
    assert logged(trainer, "judge_calls")[-1] == logged(whole["trainer"], "judge_calls")[-1]


def test_resumes_bit_for_bit_from_a_checkpoint_after_a_refresh(whole: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(whole["directory"], tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    judge = Shade(fail_after=0)  # every answer is on the disk
    trainer, refresh = make(tmp_path / "run", judge)
    trainer.train(resume_from_checkpoint=True)
    check_same(trainer, refresh, whole)
    assert judge.asked == 0


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["answers", "training", "record"])
def test_killed_inside_a_refresh(whole: dict[str, Any], tmp_path: Path, lost: str) -> None:
    shutil.copytree(whole["directory"], tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    round_one = tmp_path / "run" / "refresh" / "round-001"
    (round_one / "record.json").unlink()
    if lost != "record":
        shutil.rmtree(round_one / "reward")
    if lost == "answers":
        shutil.rmtree(round_one / "audit")
        manifest = json.loads((round_one / "labels" / "manifest.json").read_text())
        (round_one / "labels" / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
        answers = sorted((round_one / "labels" / "judgements" / "Shade").iterdir())
        answers[-1].unlink()
    judge = Shade()
    trainer, refresh = make(tmp_path / "run", judge)
    trainer.train(resume_from_checkpoint=True)
    check_same(trainer, refresh, whole)
    assert judge.asked < 20
    assert (judge.asked > 0) == (lost == "answers")


@pytest.mark.slow
def test_a_judge_that_fails_stops_the_run_and_loses_nothing(whole: dict[str, Any], tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, Shade(fail_after=24))
    with pytest.raises(ValueError, match="the judge Shade raised RuntimeError: out of order"):
        trainer.train()
    trainer, refresh = make(tmp_path, Shade())
    trainer.train(resume_from_checkpoint=True)
    check_same(trainer, refresh, whole)


@pytest.mark.slow
@pytest.mark.parametrize("full_at", ["judgements", "reward", "record.json"])
def test_a_full_disk_inside_a_refresh_loses_nothing(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    fsync, down = atomic._fsync, []

    def full(path: Path) -> None:
        if down or ("round-001" in str(path) and full_at in str(path)):
            down.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        fsync(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_fsync", full)
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path, Shade())[0].train()
    trainer, refresh = make(tmp_path, Shade())
    trainer.train(resume_from_checkpoint=True)
    check_same(trainer, refresh, whole)


def test_a_worse_reward_is_not_taken(tmp_path: Path) -> None:
    settings = RefreshSettings(every=1, budget=12, audit_budget=24, steps=3, batch_size=4, learning_rate=0.5)
    trainer, refresh = make(tmp_path, Shade(), settings, max_steps=4, save_strategy="no")
    before = reward_tensors(refresh)
    accuracies = iter([0.9, 0.2])
    refresh._accuracy = lambda scores: next(accuracies)  # type: ignore[method-assign]
    trainer.train()
    (record,) = refresh.records
    assert not record.accepted
    assert all(torch.equal(tensor, before[name]) for name, tensor in reward_tensors(refresh).items())
    assert trainer.evaluator.reward_version == 0


@pytest.mark.slow
def test_an_alarm_asks_for_a_refresh(tmp_path: Path) -> None:
    settings = RefreshSettings(every=None, budget=12, audit_budget=8, steps=1, batch_size=4, tolerance=1.0)
    trainer, refresh = make(tmp_path, Shade(), settings, max_steps=4, save_strategy="no")
    trainer.train()
    assert refresh.records == []
    trainer.hacking.alarms = ["alarm"]
    refresh.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert refresh._reasons(1) == ["reward-hacking alarm"]


@pytest.mark.slow
def test_drift_asks_for_a_refresh_and_starts_anew(tmp_path: Path) -> None:
    drift = DriftSettings(every=1, samples=4, max_distance=1e-6, max_spread=None)
    settings = RefreshSettings(
        every=None, drift=drift, budget=12, audit_budget=8, steps=1, batch_size=4, tolerance=1.0
    )
    trainer, refresh = make(tmp_path, Shade(), settings, max_steps=4)
    trainer.train()
    (record,) = refresh.records
    assert record.reasons[0].startswith("features moved by ")
    assert logged(trainer, "refresh/feature_distance")[0] > 1e-6
    again, other = make(tmp_path, Shade(), settings, max_steps=4)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(other._reference.mean, refresh._reference.mean)  # type: ignore[union-attr]


@pytest.mark.slow
def test_the_budget_of_a_run(tmp_path: Path) -> None:
    settings = RefreshSettings(
        every=1, budget=12, audit_budget=8, max_judgements=20, steps=1, batch_size=4, tolerance=1.0
    )
    trainer, refresh = make(tmp_path, Shade(), settings, save_strategy="no")
    trainer.train()
    assert len(refresh.records) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nft", "online_dpo", "backprop"])
def test_every_algorithm_goes_on_with_the_refreshed_reward(tmp_path: Path, name: str) -> None:
    trainer, refresh = make(tmp_path, Shade(), name=name, max_steps=4, save_strategy="no")
    trainer.train()
    assert refresh.records
    assert trainer.evaluator.reward_version == len(refresh.records)


@pytest.mark.slow
def test_a_history_of_rewards_is_forgotten(tmp_path: Path) -> None:
    trainer = algorithm_trainer("ddpo", tmp_path, **UNET)
    trainer.stat_tracker.update(["a"], torch.tensor([1.0]))
    trainer.reward_changed(1)
    assert trainer.stat_tracker.history == {}


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    reward, other = tiny_reward(pipeline=pipeline), tiny_reward(pipeline=pipeline)
    trainer_class, config_class, _ = ALGORITHMS["grpo"]
    config = tiny_config(tmp_path, cls=config_class)
    for refresh, message in (
        (RewardRefresh(labeller(Shade()), other, SETTINGS, AUDIT), "not among the trainer's reward_funcs"),
        (RewardRefresh(labeller(Shade()), reward, SETTINGS), "needs audit_prompts"),
        (RewardRefresh(labeller(Shade()), reward, SETTINGS, PROMPTS), "leave some to train the reward on"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_class(tiny_pipeline(), reward, config, PROMPTS, callbacks=[refresh])
    with pytest.raises(ValueError, match="budget"):
        RefreshSettings(budget=0)


def test_replay_takes_old_pairs_by_seed() -> None:
    new, old = separable_pairs(8, seed=0), separable_pairs(20, seed=1)
    rows = ReplayedPairs(new, [old], 0.5, seed=0)
    assert (len(rows), rows.replayed) == (12, 4)
    assert torch.equal(rows[0]["chosen"], new[0]["chosen"])
    assert any(torch.equal(rows[8]["chosen"], row["chosen"]) for row in (old[i] for i in range(20)))
    assert rows.fingerprint() == ReplayedPairs(new, [old], 0.5, seed=0).fingerprint()
    assert rows.fingerprint() != ReplayedPairs(new, [old], 0.5, seed=1).fingerprint()
    assert (len(ReplayedPairs(new, [], 1.0, 0)), len(ReplayedPairs(new, [old], 9.0, 0))) == (8, 28)


def test_random_states_are_left_alone() -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    state = torch.get_rng_state()
    with undisturbed(accelerator):
        torch.manual_seed(5)
        accelerator.gradient_state._set_sync_gradients(False)
    assert torch.equal(torch.get_rng_state(), state)
    assert accelerator.sync_gradients
