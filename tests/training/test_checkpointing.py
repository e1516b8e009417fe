from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from dina_reward.training.checkpointing import CheckpointedCallback
from tests.training.toy import ToyTrainer, toy_trainer


CHECKPOINT_FILES = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def checkpoints(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("checkpoint"))


def hidden(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_checkpoints_hold_what_the_plain_trainer_writes(tmp_path: Path) -> None:
    toy_trainer(tmp_path).train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert {path.name for path in (tmp_path / "checkpoint-6").iterdir()} >= CHECKPOINT_FILES
    assert not hidden(tmp_path)


def test_resume_equals_uninterrupted_run(tmp_path: Path) -> None:
    whole = toy_trainer(tmp_path / "whole", learning_rate=0.05)
    whole.train()
    first = toy_trainer(tmp_path / "parts")
    first.train()
    second = toy_trainer(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


class FailsWhileSaving(ToyTrainer):
    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        super()._save_rng_state(output_dir)


def test_interrupted_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy_trainer(tmp_path, FailsWhileSaving).train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert hidden(tmp_path) == [".checkpoint-4.incomplete"]
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")

    toy_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not hidden(tmp_path)


def test_sigkill_while_saving_leaves_whole_checkpoints(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, signal
        from tests.training.toy import ToyTrainer, toy_trainer

        class Killed(ToyTrainer):
            def _publish(self, *args):
                if self.state.global_step == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                super()._publish(*args)

        toy_trainer({str(tmp_path)!r}, Killed).train()
        """
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert {path.name for path in (tmp_path / "checkpoint-2").iterdir()} >= CHECKPOINT_FILES
    toy_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_save_total_limit_keeps_the_newest(tmp_path: Path) -> None:
    toy_trainer(tmp_path, save_total_limit=2).train()
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-6"]


class WorseAfterFirst(ToyTrainer):
    """Reports an evaluation loss that grows, so the first checkpoint stays the best."""

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        return {"eval_loss": float(self.state.global_step)}


@pytest.mark.parametrize(("limit", "expected"), [(2, ["checkpoint-2", "checkpoint-6"]), (1, ["checkpoint-2"])])
def test_best_checkpoint_is_kept_and_recorded(tmp_path: Path, limit: int, expected: list[str]) -> None:
    trainer = toy_trainer(
        tmp_path,
        WorseAfterFirst,
        save_total_limit=limit,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    assert checkpoints(tmp_path) == expected
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    best = torch.nn.Linear(1, 1)
    from safetensors.torch import load_file

    best.load_state_dict(
        {
            k.removeprefix("linear."): v
            for k, v in load_file(tmp_path / "checkpoint-2/model.safetensors").items()
            if "linear" in k
        }
    )
    assert torch.equal(best.weight, trainer.model.linear.weight)


def test_existing_checkpoint_of_the_same_step_is_replaced_as_a_whole(tmp_path: Path) -> None:
    stale = tmp_path / "checkpoint-2"
    stale.mkdir()
    (stale / "stale.txt").write_text("from an earlier run")
    toy_trainer(tmp_path, max_steps=2).train()
    assert not (stale / "stale.txt").exists()
    assert {path.name for path in stale.iterdir()} >= CHECKPOINT_FILES


class Counter(CheckpointedCallback):
    def __init__(self) -> None:
        self.loaded_from: str | None = None

    def save_state(self, directory: str) -> None:
        Path(directory, "counter.txt").write_text("1")

    def load_state(self, directory: str) -> None:
        self.loaded_from = directory


def test_callbacks_with_files_are_saved_and_restored(tmp_path: Path) -> None:
    toy_trainer(tmp_path, callbacks=[Counter()]).train()
    assert (tmp_path / "checkpoint-4" / "counter.txt").exists()
    counter = Counter()
    toy_trainer(tmp_path, callbacks=[counter]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert counter.loaded_from == str(tmp_path / "checkpoint-4")


def test_rotation_counts_checkpoints_of_an_earlier_run_as_older(tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-best"):
        (tmp_path / name).mkdir()
    toy_trainer(tmp_path, max_steps=4, save_total_limit=2).train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-best"]
