"""The command line: what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from dina_reward import LatentReward
from dina_reward.checkpoints import read_checkpoint
from dina_reward.cli.app import app
from dina_reward.noise.draws import fold_seed
from tests.test_reward import make_reward


runner = CliRunner()


@pytest.fixture(scope="module")
def world(sd3_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, a reward that names it by a relative path, two images and two latents."""
    root = tmp_path_factory.mktemp("world")
    sd3_pipeline.save_pretrained(root / "pipeline")
    reward = make_reward(sd3_pipeline)
    object.__setattr__(reward.config, "backbone_model_id", "../pipeline")
    reward.save_pretrained(root / "reward")
    generator = torch.Generator().manual_seed(0)
    save_file({"latents": torch.randn(2, 16, 8, 8, generator=generator)}, root / "latents.safetensors")
    for name, size, colour in (("a.png", (64, 64), "red"), ("b.png", (96, 64), "blue")):
        Image.new("RGB", size, colour).save(root / name)
    return root


def invoke(*arguments: object) -> Any:
    return runner.invoke(app, [str(argument) for argument in arguments])


def test_help_everywhere() -> None:
    commands = ("score", "info", "eval", "cache", "train", "align", "convert", "recipes", "demo")
    assert [name for name in commands if name not in invoke("--help").output] == []
    for command in ([], ["score"], ["convert"], ["info"], ["demo"], ["recipes"], ["recipes", "validate"]):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output


def test_scores_of_latents_and_images_match_the_library(world: Path, sd3_pipeline: Any) -> None:
    inputs = [world / "latents.safetensors", world / "a.png", world / "b.png"]
    result = invoke(
        "score", world / "reward", *inputs, "-p", "a cat", "-p", "red", "-p", "blue", "--seed", 3, "--json"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["input"] for row in rows] == ["latents.safetensors[0]", "latents.safetensors[1]", "a.png", "b.png"]
    assert [row["prompt"] for row in rows] == ["a cat", "a cat", "red", "blue"]
    reward = LatentReward.from_pretrained(world / "reward", pipeline=sd3_pipeline)
    from safetensors.torch import load_file

    latents = load_file(world / "latents.safetensors")["latents"]
    expected = reward(latents, "a cat", seed=[fold_seed(3, 0), fold_seed(3, 1)])
    torch.testing.assert_close(torch.tensor([row["score"] for row in rows[:2]]), expected, atol=1e-4, rtol=0)
    image = reward.family.encode_images(sd3_pipeline, [Image.open(world / "b.png")])
    expected = reward(image, "blue", noise_level=0.1, seed=[fold_seed(3, 3)])
    torch.testing.assert_close(torch.tensor([rows[3]["score"]]), expected, atol=1e-4, rtol=0)
    assert rows[3]["noise_levels"] == pytest.approx([0.1], abs=2e-3)


def test_table_and_ensemble(world: Path) -> None:
    result = invoke(
        "score", world / "reward", world / "a.png", "-p", "red", "--noise-level", 0.2, "--noise-level", 0.5,
        "--ensemble", "mean", "--num-noise-samples", 2, "--normalize",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "a.png" in result.output
    assert "noise std" in result.output


def test_info_and_convert(parity_dir: Path, tmp_path: Path) -> None:
    result = invoke("convert", parity_dir / "reward", tmp_path / "native")
    assert result.exit_code == 0, result.output
    assert "sd3, 3 blocks" in result.output
    assert read_checkpoint(tmp_path / "native").config.num_layers == 3
    result = invoke("info", tmp_path / "native")
    assert "rank 4, alpha 8, 8,192 parameters" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{reward}", "{a}", "-p", "x", "-p", "y"], "got 2 prompts for 1 inputs"),
        (["{reward}", "{a}"], "got 0 prompts for 1 inputs"),
        (["{reward}", "{config}", "-p", "x"], "the image cannot be read"),
        (["{reward}", "{head}", "-p", "x"], "has no tensor 'latents'"),
        (["{reward}", "{a}", "-p", "x", "--noise-level", "40"], "must lie in"),
        (["{nothing}", "{a}", "-p", "x"], "neither a directory here nor a repository"),
        (["{reward}", "{a}", "-p", "x", "--pipeline", "./nowhere"], "cannot load the pipeline"),
        (["{reward}", "{cut}", "-p", "x"], "the image cannot be read"),
        (["{reward}", "{reward}", "-p", "x"], "is no file; give images"),
        (["{reward}", "{scalar}", "-p", "x"], "has latents of shape (); expected a batch"),
        (["{reward}", "{empty}", "-p", "x"], "has latents of shape (0, 16, 8, 8); expected a batch with at least one"),
        (["{reward}", "{a}", "-p", "x", "--device", "gpu"], "there is no device 'gpu' here"),
        pytest.param(
            ["{reward}", "{a}", "-p", "x", "--device", "cuda"],
            "there is no device 'cuda' here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_bad_input_says_what_is_wrong(world: Path, arguments: list[str], message: str) -> None:
    (world / "cut.png").write_bytes((world / "a.png").read_bytes()[:60])
    save_file({"latents": torch.zeros(())}, world / "scalar.safetensors")
    save_file({"latents": torch.zeros(0, 16, 8, 8)}, world / "empty.safetensors")
    places = {
        **{path.stem: path for path in (world / "cut.png", world / "scalar.safetensors", world / "empty.safetensors")},
        "reward": world / "reward",
        "a": world / "a.png",
        "config": world / "reward" / "config.json",
        "head": world / "reward" / "head.safetensors",
        "nothing": "./no/such/reward",
    }
    result = invoke("score", *(argument.format(**places) for argument in arguments))
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_a_decompression_bomb_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)  # a.png has 4096, more than twice as many
    result = invoke("score", world / "reward", world / "a.png", "-p", "x")
    assert isinstance(result.exception, ValueError)
    assert "could be decompression bomb DOS attack" in str(result.exception)


def test_train_hands_its_options_to_the_parser(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: x\ndataset_name: y\nlora_rnak: 4\n")
    result = invoke("train", "--config", config)
    assert isinstance(result.exception, ValueError)
    assert "lora_rnak" in str(result.exception)
    result = invoke("train", "--help")
    assert result.exit_code == 0
    assert "--eval_noise_levels" in result.output
