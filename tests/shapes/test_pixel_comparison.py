"""The jobs of the comparison: which pairs count where, what a score costs, and what a run of training has spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from dina_reward.shapes import load_reward, pixel_comparison
from dina_reward.shapes.pixel_comparison import CELLS, accuracy_by_cell, measure_cost, parameters_of
from dina_reward.shapes.pixel_reward import PixelReward
from dina_reward.shapes.preferences import NEGLIGIBLE_GAP, PreferencePairs, build_pool, sample_pairs
from dina_reward.shapes.reward import CLEAR_DIFFERENCE


@pytest.fixture(scope="module")
def pairs(shapes_pipeline: Any) -> PreferencePairs:
    return sample_pairs(build_pool(shapes_pipeline, "held_out", 24, seed=0), "held_out", 300, seed=0)


def test_accuracy_is_of_clear_pairs_and_by_what_differs(pairs: PreferencePairs) -> None:
    labels = torch.tensor([record["p_chosen"] for record in pairs])
    blind = torch.tensor([record["gap"] * (-1 if record["differs"] == "shape" else 1) for record in pairs])
    found = accuracy_by_cell(blind, labels, pairs)
    assert {name: each.value for name, each in found.items() if name != "overall"} == {
        name: float(name != "shape") for name in CELLS
    }
    apart = (pairs.cleanness[pairs.chosen] - pairs.cleanness[pairs.rejected]).abs().tolist()
    clear = [
        record
        for record, difference in zip(pairs, apart, strict=True)
        if abs(record["gap"]) > NEGLIGIBLE_GAP or (record["differs"] == "cleanness" and difference > CLEAR_DIFFERENCE)
    ]
    shapes = sum(record["differs"] == "shape" for record in clear)
    assert 5 < shapes < len(clear) < len(pairs)
    assert found["overall"].counted == len(clear)
    assert found["overall"].value == pytest.approx(1 - shapes / len(clear))
    assert found["shape"].counted == shapes


def test_cost_of_a_score_includes_the_decoder_for_a_pixel_reward_alone(
    shapes_pipeline: Any, pairs: PreferencePairs
) -> None:
    latent = load_reward(pipeline=shapes_pipeline, share_backbone=True)
    pixel = PixelReward.new(shapes_pipeline, widths=(8, 8), blocks=(0,), text_size=8)
    costs = [measure_cost(reward, shapes_pipeline, pairs.latents[:16], [0.4], repeats=3) for reward in (latent, pixel)]
    assert costs[0]["score_ms"] > 0
    assert costs[0]["decode_ms"] == 0
    assert 0 < costs[1]["decode_ms"] < 1.5 * costs[1]["score_ms"]  # measured apart, so that noise may turn them round
    assert all(cost["peak_memory_mb"] >= 0 for cost in costs)
    sizes = parameters_of(latent)
    assert 0 < sizes["trained_parameters"] < sizes["parameters"]
    assert parameters_of(pixel) == dict.fromkeys(("parameters", "trained_parameters"), pixel.num_parameters)


def test_the_clock_stands_still_in_evaluations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, state, control = pixel_comparison._Clock(), TrainerState(), TrainerControl()
    event = (TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), state, control)
    times = iter([100, 105, 120, 130, 140, 150])
    monkeypatch.setattr(pixel_comparison.time, "process_time", lambda: next(times))
    clock.on_train_begin(*event)
    clock.on_evaluate(*event)  # takes 5
    state.global_step = 4
    clock.on_step_end(*event)  # after 15 of training
    clock.on_evaluate(*event)  # takes 10
    state.global_step = 8
    clock.on_step_end(*event)  # after 10 more
    clock.on_evaluate(*event)
    assert clock.seconds == {0: 0, 4: 15, 8: 25}


def test_unknown_rewards_are_refused(shapes_pipeline: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no reward called 'both'; there are: latent, pixel"):
        pixel_comparison.load_kind("both", tmp_path, shapes_pipeline)
