"""Pipelines from a path: none of their own code runs, whatever the version of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dina_reward.backbones.pipelines import load_pipeline, pipeline_index
from dina_reward.cli.score_run import load_pipeline as load_for_score
from dina_reward.cli.score_run import locate_reward
from tests.test_reward import make_reward


EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass X: pass\n"


@pytest.fixture
def pipeline_directory(sd3_pipeline: Any, tmp_path: Path) -> Path:
    directory = tmp_path / "pipeline"
    directory.mkdir()
    parts: dict[str, list[str | None]] = {
        name: [None, None] if part is None else [type(part).__module__.split(".")[0], type(part).__name__]
        for name, part in sd3_pipeline.components.items()
    }
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", **parts}))
    return directory


def spoil(directory: Path, name: str, value: Any) -> None:
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps({**index, name: value}))
    for place in (directory, directory / "transformer"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(EVIL)


def test_a_plain_index_is_read(pipeline_directory: Path) -> None:
    assert pipeline_index(str(pipeline_directory))["_class_name"] == "StableDiffusion3Pipeline"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_class_name", ["evil", "X"], r"names the class \['evil', 'X'\]"),
        ("_class_name", "X", "names the class 'X'"),
        ("_class_name", "AutoencoderKL", "names the class 'AutoencoderKL'"),
        ("_class_name", "AudioLDMPipeline", "AudioLDMPipeline"),
        ("transformer", ["evil", "X"], "takes 'transformer' from 'evil'"),
        ("transformer", ["os", "system"], "takes 'transformer' from 'os'"),
        ("transformer", [["evil"], "X"], "takes 'transformer' from"),
    ],
)
def test_code_beside_the_weights_never_runs(pipeline_directory: Path, name: str, value: Any, message: str) -> None:
    spoil(pipeline_directory, name, value)
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(pipeline_directory))
    assert not list(pipeline_directory.rglob("ran"))


def test_a_checkpoint_cannot_name_a_directory_that_runs(
    sd3_pipeline: Any, pipeline_directory: Path, tmp_path: Path
) -> None:
    """What `dina-reward score` and `dina-reward eval` do with a downloaded directory."""
    reward = make_reward(sd3_pipeline)
    object.__setattr__(reward.config, "backbone_model_id", "../pipeline")
    reward.save_pretrained(tmp_path / "reward")
    spoil(pipeline_directory, "_class_name", ["evil", "X"])
    _, model_id = locate_reward(str(tmp_path / "reward"), None)
    assert Path(model_id) == pipeline_directory
    with pytest.raises(ValueError, match="which is not one of diffusers'"):
        load_for_score(model_id, device="cpu")
    assert not list(pipeline_directory.rglob("ran"))


def test_pipelines_are_loaded_through_this_door_alone() -> None:
    package = Path(__file__).parents[2] / "dina_reward"
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "DiffusionPipeline.from_pretrained(" in path.read_text()
        or "DiffusionPipeline.load_config(" in path.read_text()
    }
    # `shapes` reads what the package ships, or what its own build wrote.
    assert {name for name in found if not name.startswith("shapes/")} == {"backbones/pipelines.py"}


def test_an_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match="no device 'gpu' here"):
        load_for_score("anything", device="gpu")
