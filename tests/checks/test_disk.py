"""Faults of the disk in one line, and every long command on a full or read-only one."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from dina_reward.checkpoints import atomic
from dina_reward.checks.disk import disk_fault
from dina_reward.data import LatentPreferenceDataset, build_cache
from tests.alignment.helpers import algorithm_trainer, lora_tensors
from tests.data.cache_world import SETTINGS, make_pairs, shard_bytes
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


def make_grpo(directory: Path) -> Any:
    return algorithm_trainer("grpo", directory, max_steps=4, save_strategy="steps", save_steps=2)


def make_reward(directory: Path) -> Any:
    return tiny_trainer(directory, max_steps=4, save_strategy="steps", save_steps=2, ema_decay=0.9)


@pytest.mark.parametrize(("make", "weights"), [(make_reward, trained_parameters), (make_grpo, lora_tensors)])
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
