"""`dina-reward demo`: a table, a picture, and training that never decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from dina_reward.alignment.monitoring.evaluation import read_history
from dina_reward.cli.app import app
from dina_reward.cli.demo_run import shown_prompts
from dina_reward.shapes import alignment
from dina_reward.shapes.alignment import EVALUATION_IMAGES, held_out_prompts
from dina_reward.shapes.prompts import Scene


def test_demo_writes_and_names_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dina_reward.shapes.alignment.EVALUATION_PROMPTS", EVALUATION_IMAGES)
    monkeypatch.setitem(alignment._COMMON, "per_device_train_batch_size", 24)  # instead of 96
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), "--iterations", "1"])
    assert result.exit_code == 0, result.output
    assert "latent reward (trained on)" in result.output
    assert str(tmp_path / "demo.png") in result.output.replace("\n", "")
    assert Image.open(tmp_path / "demo.png").size == (1700, 480)
    history = read_history(tmp_path / "evaluation_history.jsonl")
    assert [record.step for record in history] == [0, 2]
    assert {"reward", "fit", "cleanness", "hacking_alarm"} == set(history[0].metrics)


def test_the_picture_shows_two_prompts_of_each_shape_in_the_order_of_the_evaluation() -> None:
    prompts = held_out_prompts()
    shown = shown_prompts(prompts)
    shapes = [Scene.parse(prompts[number]).shape for number in shown]
    assert shapes == ["circle", "circle", "square", "square", "triangle", "triangle", "cross", "cross"]
    first = next(number for number, prompt in enumerate(prompts) if "circle" in prompt)
    assert shown[0] == first


def test_shipped_alignment_never_decodes_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    from dina_reward.shapes.alignment import align

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded in training")

    monkeypatch.setattr(AutoencoderKL, "decode", forbidden)
    align(tmp_path, iterations=1, eval_strategy="no", eval_on_start=False, per_device_train_batch_size=24)
