"""Samples of generators that were aligned with a reward without restraint."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from dina_reward.shapes import attack, weights_dir
from dina_reward.shapes.worlds import World, world_of


def _in_three_steps(world: World) -> World:
    return replace(world, sample=partial(world.sample, num_inference_steps=3))


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = {"num_inference_steps": 3, "sde_window_size": 1, "sde_window_range": [0, 2]}
    refl = {**attack.ATTACKS["refl-0.1"], "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.05}
    grpo = {"max_steps": 2, "per_device_train_batch_size": 12, "steps_per_generation": 1}
    refl, grpo = ({**run, **sampler} for run in (refl, grpo))
    monkeypatch.setattr(attack, "ATTACKS", {"refl": refl, "grpo": grpo})
    monkeypatch.setattr(attack, "SNAPSHOTS", (0.5, 1.0))
    monkeypatch.setattr(attack, "world_of", lambda pipeline: _in_three_steps(world_of(pipeline)))


@pytest.mark.parametrize("world", [pytest.param("flow", marks=pytest.mark.slow), "ddpm"])
def test_samples_come_from_every_run_and_snapshot(world: str, tmp_path: Path, short_runs: None) -> None:
    paths = (weights_dir(world), weights_dir(f"{world}-reward"))
    counts = {"train": 8, "held_out": 4}
    latents = attack.attack_reward(*paths, tmp_path, counts, seed=0)
    assert {split: tuple(part.shape) for split, part in latents.items()} == {
        "train": (8, 8, 8, 8),
        "held_out": (4, 8, 8, 8),
    }
    assert all(part.isfinite().all() for part in latents.values())
    assert len(latents["train"].flatten(1).unique(dim=0)) == 8
    again = attack.attack_reward(*paths, tmp_path, counts, seed=0)
    assert torch.equal(again["train"], latents["train"])
