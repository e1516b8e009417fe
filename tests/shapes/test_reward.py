"""The shipped reward keeps its promises on pairs it has never seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.shapes import build_pool, load_pipeline, load_reward, sample_pairs, sample_prompts
from dina_reward.shapes.preferences import NEGLIGIBLE_GAP, PreferencePairs
from dina_reward.shapes.reward import evaluate_reward, fresh_pairs, new_reward, train_reward
from dina_reward.shapes.worlds import world_of


LEAST = {"size": 0.85, "color": 0.9, "shape": 0.8, "background": 0.95, "several": 0.9, "cleanness": 0.65}
"""Accuracy at level 0.4 that no reward may fall below, by what differs, on some hundred pairs each."""


LEAST_OUTLINES = 0.65
"""Accuracy at level 0.1 on pairs of any two outlines, on some dozens of pairs each; a coin flip has 0.5."""


@pytest.fixture(scope="module", params=["flow", "ddpm"])
def world(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipeline(world: str) -> Any:
    return load_pipeline(world)


@pytest.fixture(scope="module")
def reward(world: str, pipeline: Any) -> LatentReward:
    return load_reward(world, pipeline=pipeline)


@pytest.fixture(scope="module")
def pairs(pipeline: Any) -> PreferencePairs:
    return fresh_pairs(pipeline, world_of(pipeline).name, pool=64, count=1600, seed=99)


@pytest.fixture(scope="module")
def latents(pipeline: Any) -> Tensor:
    """Some of every source."""
    return build_pool(pipeline, "held_out", 4, seed=99).latents[:16]


@pytest.mark.slow
def test_accuracy_ensemble_and_calibration(reward: LatentReward, pairs: PreferencePairs) -> None:
    report = evaluate_reward(reward, pairs)
    assert report.accuracy["0.4"].value >= 0.85
    assert report.accuracy["ensemble"].value >= report.accuracy[report.best_level].value - 0.04
    # Of all pairs, close ones included, at every level.
    errors = {level: fit.expected_calibration_error for level, fit in report.calibration.items()}
    assert max(errors.values()) < 0.05, errors
    assert sum(row.count for row in report.calibration["0.4"].bins) == len(pairs)
    # No attribute hides behind the others.
    cells = report.by["differs"]["0.4"]
    assert {name for name, cell in cells.items() if cell.accuracy.value < LEAST[name]} == set(), cells
    # Nor does a pair of outlines hide behind the others.
    outlines = {name: cell.accuracy.value for name, cell in report.by["outlines"]["0.1"].items()}
    assert len(outlines) == 7
    assert min(outlines.values()) >= LEAST_OUTLINES, outlines
    clear = sum(abs(pair["gap"]) > NEGLIGIBLE_GAP or pair["differs"] == "cleanness" for pair in pairs)
    assert report.accuracy["0.4"].counted < clear


def test_wrong_captions_score_lower(reward: LatentReward, pipeline: Any) -> None:
    from dina_reward.shapes import Scene, encode_images, render, sample_scenes

    scenes = sample_scenes(48, "held_out", seed=3)
    latents = encode_images(pipeline.vae, render(scenes, torch.Generator().manual_seed(3)))
    right = reward(latents, [scene.caption for scene in scenes], seed=0)
    colours = {"red": "blue"}
    wrong = [
        Scene(scene.size, colours.get(scene.color, "red"), scene.shape, scene.background).caption for scene in scenes
    ]
    assert float((right > reward(latents, wrong, seed=0)).float().mean()) > 0.9


def test_shared_and_standalone_agree(world: str, reward: LatentReward, pipeline: Any, latents: Tensor) -> None:
    shared = load_reward(world, pipeline=pipeline, share_backbone=True)
    prompts = sample_prompts(16, "held_out", seed=0)
    torch.testing.assert_close(shared(latents, prompts, seed=0), reward(latents, prompts, seed=0), atol=1e-4, rtol=0)


def test_it_finds_its_backbone_beside_itself(world: str, reward: LatentReward, latents: Tensor) -> None:
    alone = load_reward(world)
    conditioning, index = reward.encode_prompts(sample_prompts(4, "held_out", seed=0))
    rows = conditioning[index]
    embeds = {"prompt_embeds": rows.prompt_embeds, "pooled_prompt_embeds": rows.pooled_prompt_embeds}
    expected = reward(latents[:4], seed=0, **embeds)
    torch.testing.assert_close(alone(latents[:4], seed=0, **embeds), expected, atol=1e-4, rtol=0)


def test_training_writes_a_reward_and_is_not_repeated(
    world: str, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_pairs = sample_pairs(build_pool(pipeline, "train", 16, seed=5), "train", 128, seed=5)
    first = train_reward(pipeline, train_pairs, tmp_path, steps=4, batch_size=8)
    assert first.merged
    assert first.config.backbone_model_id == f"../{world}"
    assert (tmp_path / "checkpoint-4").is_dir()
    monkeypatch.setattr("dina_reward.shapes.reward.LatentRewardTrainer", None)
    again = train_reward(pipeline, train_pairs, tmp_path, steps=4, batch_size=8)
    states = [candidate.model.trainable_state() for candidate in (first, again, new_reward(pipeline))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
