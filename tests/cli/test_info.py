"""`dina-reward info`: rewards, pipelines on disk, classes and published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dina_reward.cli.app import app
from tests.families.rows.flux import tiny_flux_pipeline


runner = CliRunner()


def invoke(*arguments: object) -> Any:
    return runner.invoke(app, ["info", *map(str, arguments)])


def cards(*arguments: object) -> list[dict[str, Any]]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def flux_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration files of a pipeline, without a weight."""
    directory = tmp_path_factory.mktemp("flux")
    tiny_flux_pipeline().save_pretrained(directory)
    for weights in directory.rglob("*.safetensors"):
        weights.unlink()
    return directory


def test_reward() -> None:
    assert "rank 32, alpha 64, 442,368 parameters" in invoke("shapes").output
    (reward,) = cards("shapes")
    assert reward["family"] == "sd3"
    assert reward["lora"] == {"rank": 32, "alpha": 64}
    assert reward["parameters"] == {"LoRA": 442_368, "head": 549_843}


def test_pipeline_directory_is_read_without_weights(flux_directory: Path) -> None:
    (card,) = cards(flux_directory, "--height", 64, "--width", 96)
    assert (card["family"], card["total_blocks"], card["num_layers"], card["taps"]) == ("flux", 4, 2, [1, 2])
    assert (card["latent_shape"], card["pipeline_latent_shape"]) == ([16, 8, 12], [24, 64])
    assert (card["text_width"], card["pooled_text_width"], card["text_tokens"]) == (32, 32, 512)
    transformer = tiny_flux_pipeline().transformer
    assert card["denoiser_parameters"] == sum(p.numel() for p in transformer.parameters())
    assert 0 < card["backbone_flops"] < card["reward_flops"]
    assert card["step_flops"] > card["backbone_flops"]


def test_shipped_pipeline_has_the_size_of_its_samples() -> None:
    from dina_reward.shapes import weights_dir

    (card,) = cards(weights_dir("flow"), "--no-flops")
    assert (card["height"], card["width"], card["latent_shape"]) == (32, 32, [8, 8, 8])


def test_published_model_by_class_name_and_id() -> None:
    by_class, by_name, by_id = (
        cards(target, "--no-flops")
        for target in ("SanaPipeline", "Sana-600M-1024px", "Efficient-Large-Model/Sana_600M_1024px_diffusers")
    )
    assert [card["name"] for card in by_class] == ["Sana-1600M-1024px", "Sana-600M-1024px"]
    assert by_name == by_id == by_class[1:]
    assert by_name[0]["step_flops"] is None


def test_table(flux_directory: Path) -> None:
    text = " ".join(invoke(flux_directory, "--height", 64, "--width", 96).output.split())
    assert "2 of 4, taps (1, 2) (this package's rule)" in text
    assert "96 x 64 pixels" in text
    assert "of a generator step)" in text
    assert "MFLOPs, without guidance" in text
    assert "FLOPs" not in invoke(flux_directory, "--height", 64, "--width", 96, "--no-flops").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FooPipeline"], "FooPipeline belongs to no supported model family. Supported classes: flux: FluxPipeline"),
        (["SD1.5", "--height", "500"], "image size 500 x 512 must be divisible by 8"),
        (["SD1.5", "--num-frames", "5"], "num_frames must be 1, got 5"),
        (["shapes", "--height", "512"], "is a reward checkpoint; --height apply to pipelines and classes"),
        (["no/such/repository"], "neither a directory here nor a repository"),
    ],
)
def test_errors(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)


def test_broken_pipelines(flux_directory: Path, tmp_path: Path) -> None:
    index = json.loads((flux_directory / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "AllegroPipeline"}))
    assert "AllegroPipeline belongs to no supported model family" in str(invoke(tmp_path).exception)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "transformer/config.json is missing" in str(invoke(tmp_path).exception)
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "vae": [None, None]}))
    assert "has no vae" in str(invoke(tmp_path).exception)
