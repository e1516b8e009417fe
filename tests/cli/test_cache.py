"""`dina-reward cache`, from published files to a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dina_reward.cli.app import app
from dina_reward.cli.cache import load_encoders
from dina_reward.data import CachedPreferences, read_preferences
from dina_reward.data.buckets import Bucket, fit_image
from dina_reward.families import family_of
from dina_reward.shapes import load_pipeline
from tests.data.cache_world import write_images


runner = CliRunner()
BUCKETS = ("--bucket", "32x32", "--bucket", "48x32", "--bucket", "16")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs in the form of HPDv2; one of them shares no bucket."""
    folder = tmp_path_factory.mktemp("dataset")
    write_images(folder, 24)
    rows = [
        {
            "prompt": f"prompt {row % 3}",
            "file_path": [f"{row}.png", f"{row + (1 if row % 9 == 1 else 4)}.png"],
            "human_preference": [1, 0],
        }
        for row in range(20)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def invoke(*arguments: object) -> Any:
    return runner.invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("pipeline", ["shapes", "shapes-ddpm"])
def test_from_json_to_latents(dataset: Path, tmp_path: Path, pipeline: str) -> None:
    arguments = ["cache", dataset / "train.json", "--pipeline", pipeline, "-o", tmp_path / "cache", *BUCKETS]
    estimate = invoke(*arguments, "--dry-run")
    assert estimate.exit_code == 0, estimate.output
    assert "19 of 20 pairs" in estimate.output
    assert "1 without a common bucket" in estimate.output
    assert "nothing was encoded" in estimate.output
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert "19 of 20 pairs" in result.output
    assert "KiB in 3 shards" in result.output
    assert f"wrote {tmp_path / 'cache'}" in result.output.replace("\n", "")

    rows, pairs = CachedPreferences(tmp_path / "cache"), read_preferences(dataset / "train.json")
    loaded = load_pipeline("flow" if pipeline == "shapes" else "ddpm")
    assert len(rows) == 19
    for row, pair in ((rows[0], pairs[0]), (rows[-1], pairs[19])):
        image = fit_image(pair.a, Bucket.parse(row["bucket"]))
        expected = family_of(loaded).encode_images(loaded, [image])[0]
        torch.testing.assert_close(row["chosen"], expected, atol=1e-2, rtol=1e-3)
        assert (row["p_chosen"], row["prompt"]) == (pair.p_a, pair.prompt)
        assert not rows.has_prompt_embeds


def test_the_denoiser_is_not_loaded() -> None:
    pipeline = load_encoders("shapes", "float32", "cpu", text=False)
    assert {parameter.device.type for parameter in pipeline.transformer.parameters()} == {"meta"}
    assert pipeline.text_encoder is None
    assert next(pipeline.vae.parameters()).device.type == "cpu"
    with_text = load_encoders("shapes", "bfloat16", "cpu", text=True)
    assert next(with_text.text_encoder.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", "nowhere/nothing"], "is no diffusers pipeline that can be loaded"),
        (["--pipeline", "shapes", "--bucket", "wide"], "a bucket is written WIDTHxHEIGHT"),
        (["--pipeline", "shapes"], "none of the 20 pairs can be cached"),
    ],
)
def test_errors_say_what_to_do(dataset: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke("cache", dataset / "train.json", "-o", tmp_path / "cache", *arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_dtypes_are_listed(dataset: Path, tmp_path: Path) -> None:
    result = invoke("cache", dataset / "train.json", "-o", tmp_path, "--pipeline", "shapes", "--dtype", "int8")
    assert result.exit_code == 2
    assert all(name in result.output for name in ("float32", "bfloat16", "float16"))


def test_help() -> None:
    result = invoke("cache", "--help")
    assert result.exit_code == 0
    assert "DATASET" in result.output
