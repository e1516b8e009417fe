"""`dina-reward sample` on the embedded world."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from dina_reward.cli.app import app
from dina_reward.cli.sample import MethodChoice
from dina_reward.cli.sample_run import parsed_settings, sample_prompts
from dina_reward.search.api import METHODS


def test_sample_writes_picture_and_page(tmp_path: Path) -> None:
    output = tmp_path / "grid.png"
    words = ["sample", "shapes", "a large red circle on a white background", "--steps", "5", "--budget", "2"]
    words += ["--method", "halving", "--set", "checks=0.4,0.6", "--output", str(output), "--report", "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    facts = json.loads(result.stdout)
    assert facts["denoiser_calls"] <= 2 * 5
    assert facts["reward_calls"] >= 3
    assert facts["decoder_calls"] == 1
    assert [row["prompt"] for row in facts["samples"]] == ["a large red circle on a white background"]
    assert facts["files"] == [str(output), str(tmp_path / "grid-report.png")]
    assert all(Image.open(path).width > 90 for path in facts["files"])


def test_every_method_is_offered() -> None:
    assert {choice.value for choice in MethodChoice} == METHODS.keys()


def test_settings_are_read() -> None:
    words = ["checks=0.4,0.6", "strength=5", "potential=max", "threshold=None"]
    expected = {"checks": (0.4, 0.6), "strength": 5, "potential": "max", "threshold": None}
    assert parsed_settings(words) == expected
    for word in ("strength", "=5", "strength="):
        with pytest.raises(ValueError, match="--set takes name=value"):
            parsed_settings([word])


def test_a_pipeline_without_a_reward_of_its_own_needs_one() -> None:
    with pytest.raises(ValueError, match="name a reward on 'stabilityai/x' with --reward"):
        sample_prompts("stabilityai/x", ["a cat"])
