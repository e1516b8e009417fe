"""Faults of the disk in one line, and every long command on a full or read-only one."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from dina_reward.alignment.monitoring.pictures import save_picture
from dina_reward.checkpoints import atomic
from dina_reward.checkpoints.kept_results import identity, write_result
from dina_reward.checks.disk import disk_fault
from dina_reward.data import LatentPreferenceDataset, build_cache
from dina_reward.distill import JudgeLabeller, JudgeLimits
from tests.alignment.helpers import ALGORITHMS, algorithm_trainer, lora_tensors
from tests.data.cache_world import SETTINGS, make_pairs, shard_bytes
from tests.distill.helpers import PROMPTS, Brightness, NoiseSource
from tests.tiny_models import tiny_sd_pipeline
from tests.training.tiny_reward import tiny_reward, tiny_trainer, trained_parameters


FailsAt = Callable[[str], AbstractContextManager[None]]


@pytest.fixture(params=[errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def fails_at(request: pytest.FixtureRequest) -> FailsAt:
    """``with fails_at(name)``: the disk takes no more once a path with this name in it is flushed."""
    fsync = atomic._fsync

    class Broken:
        def __init__(self, name: str) -> None:
            self.patch, self.name, self.down = pytest.MonkeyPatch(), name, False

        def __enter__(self) -> None:
            self.patch.setattr(atomic, "_fsync", self.flush)

        def __exit__(self, *error: object) -> None:
            self.patch.undo()
            assert self.down, f"nothing was written to {self.name}"

        def flush(self, path: Path) -> None:
            self.down |= self.name in str(path)
            if self.down:
                raise OSError(request.param, os.strerror(request.param), str(path))
            fsync(path)

    return Broken


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_faults_of_the_disk_are_named() -> None:
    full = disk_fault(OSError(errno.ENOSPC, "No space left on device", "out/x"))
    assert full is not None
    assert full.startswith("out/x: No space left on device. What was complete before is whole")
    assert disk_fault(SafetensorError("I/O error: Read-only file system (os error 30)")) is not None
    assert disk_fault(FileNotFoundError(errno.ENOENT, "no", "x")) is None
    assert disk_fault(ValueError("no space")) is None


def test_commands_and_recipes_end_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dina_reward.cli import app
    from dina_reward.recipes.arguments import _faults_in_one_line

    error = OSError(errno.EROFS, "Read-only file system", "out")

    def broken() -> None:
        raise error

    monkeypatch.setattr(app, "app", broken)
    with pytest.raises(SystemExit, match="1"):
        app.main()
    assert capsys.readouterr().err.startswith("error: out: Read-only file system. What")
    _faults_in_one_line(OSError, error, None)
    assert len(capsys.readouterr().err.splitlines()) == 1
    _faults_in_one_line(KeyError, KeyError("x"), sys.exc_info()[2])
    assert "KeyError" in capsys.readouterr().err


def make_policy(name: str) -> Callable[[Path], Any]:
    return partial(algorithm_trainer, name, max_steps=4, save_strategy="steps", save_steps=2)


def make_reward(directory: Path) -> Any:
    return tiny_trainer(directory, max_steps=4, save_strategy="steps", save_steps=2, ema_decay=0.9)


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (make_reward, trained_parameters),
        (make_policy("grpo"), lora_tensors),
        *(
            pytest.param(make_policy(name), lora_tensors, marks=pytest.mark.slow)
            for name in ALGORITHMS
            if name != "grpo"
        ),
    ],
    ids=["reward", "grpo", *(name for name in ALGORITHMS if name != "grpo")],
)
def test_training_goes_on_from_the_last_whole_checkpoint(
    make: Callable[[Path], Any], weights: Callable[[Any], dict[str, torch.Tensor]], fails_at: FailsAt, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=r"checkpoint-4"), fails_at("checkpoint-4"):
        make(tmp_path / "broken").train()
    assert [name for name in left(tmp_path / "broken") if "checkpoint" in name] == ["checkpoint-2"]
    resumed, whole = make(tmp_path / "broken"), make(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_a_cache_goes_on_and_ends_with_the_same_bytes(fails_at: FailsAt, tmp_path: Path) -> None:
    pairs, pipeline = make_pairs(tmp_path / "images", 24), tiny_sd_pipeline()
    with pytest.raises(OSError, match=r"arrow"), fails_at("000001.arrow"):
        build_cache(pairs, pipeline, tmp_path / "broken", SETTINGS, progress=False)
    assert not list((tmp_path / "broken").rglob("*.incomplete"))
    for name in ("broken", "whole"):
        build_cache(pairs, pipeline, tmp_path / name, SETTINGS, progress=False)
    assert shard_bytes(tmp_path / "broken") == shard_bytes(tmp_path / "whole")


def test_rewards_and_preferences_stay_as_they_were(fails_at: FailsAt, tmp_path: Path) -> None:
    reward, other = tiny_reward(seed=0), tiny_reward(seed=1)
    latents = torch.randn(2, 16, 8, 8)
    preferences = LatentPreferenceDataset(["a", "b"], latents, -latents)
    for saved, save in (("reward", reward.save_pretrained), ("pairs", preferences.save)):
        save(tmp_path / saved)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for saved, save in (("reward", other.save_pretrained), ("pairs", preferences.save)):
        with pytest.raises(OSError, match=saved), fails_at(saved):
            save(tmp_path / saved)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert left(tmp_path) == ["pairs", "reward"]


def test_labels_of_a_judge_go_on_and_ask_nothing_twice(fails_at: FailsAt, tmp_path: Path) -> None:
    judge = Brightness()
    labeller = JudgeLabeller(judge, limits=JudgeLimits(batch_size=8, retries=0))
    with pytest.raises(OSError, match=r"000001\.json"), fails_at("000001.json"):
        labeller.label(tmp_path, NoiseSource(), PROMPTS, 40)
    assert not list(tmp_path.rglob("*.incomplete"))
    before = sum(judge.asked)
    report = labeller.label(tmp_path, NoiseSource(), PROMPTS, 40)
    assert sum(judge.asked) == report.calls + 8  # the answers that could not be written
    assert before == 16


def write_evaluation(directory: Path, figure: int) -> None:
    from dina_reward.cli import eval_run

    class Comparison:
        def to_dict(self) -> dict[str, int]:
            return {"figure": figure}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_run, "comparison_table", lambda comparison: str(figure))
        patch.setattr(eval_run, "plot_comparison", lambda comparison, path: path.write_bytes(bytes([figure])))
        eval_run.write_evaluation(Comparison(), directory)  # type: ignore[arg-type]


def write_kept_result(directory: Path, figure: int) -> None:
    write_result(directory / "evaluation_of_a_benchmark.json", identity({}), {"figure": figure})


def write_picture(directory: Path, figure: int) -> None:
    save_picture(Image.new("RGB", (8, 8), (figure, 0, 0)), directory / "evaluation.png")


@pytest.mark.parametrize("write", [write_evaluation, write_kept_result, write_picture])
def test_what_a_command_writes_at_its_end_is_the_old_or_the_new(
    write: Callable[[Path, int], None], fails_at: FailsAt, tmp_path: Path
) -> None:
    write(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="evaluation"), fails_at("evaluation"):
        write(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(tmp_path, 2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} != before
