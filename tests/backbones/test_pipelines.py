"""Pipelines from a path: none of their own code runs, whatever the version of diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dina_reward.backbones.pipelines import check_loading_report, load_pipeline, pipeline_index
from dina_reward.cli.score_run import load_pipeline as load_for_score
from dina_reward.cli.score_run import locate_reward
from tests.test_reward import make_reward
from tests.tiny_models import tiny_sd_pipeline


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


@pytest.fixture(scope="module")
def saved_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "sd"
    tiny_sd_pipeline().save_pretrained(directory)
    return directory


def rename_tensors(path: Path, rename: Callable[[str], str | None]) -> None:
    tensors = {rename(name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: None if name.endswith("final_layer_norm.bias") else name, r"there are 1 missing \(.*layer_norm.bias"),
        (lambda name: name.replace("fc1", "fc9"), r"4 missing \(.*fc1.*4 not of this model \(.*fc9"),
    ],
)  # fmt: skip
def test_text_encoders_with_other_tensors_are_refused(
    saved_sd: Path, tmp_path: Path, rename: Callable[[str], str | None], message: str
) -> None:
    shutil.copytree(saved_sd, tmp_path / "sd")
    rename_tensors(tmp_path / "sd" / "text_encoder" / "model.safetensors", rename)
    with pytest.raises(ValueError, match=f"text_encoder is not loaded: .*{message}"):
        load_pipeline(str(tmp_path / "sd"))


def test_a_whole_pipeline_is_loaded_with_the_options_of_diffusers(saved_sd: Path) -> None:
    pipeline = load_pipeline(str(saved_sd), dtype=torch.bfloat16, vae=None)
    assert pipeline.vae is None
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.bfloat16
    assert load_pipeline(str(saved_sd), text_encoder=None, tokenizer=None).text_encoder is None


def test_towers_that_an_encoder_was_cut_out_of_may_be_left_over() -> None:
    report = {
        "missing_keys": set(),
        "unexpected_keys": {"lm_head.weight", "vision_model.post"},
        "mismatched_keys": set(),
    }
    check_loading_report("here", "CLIPTextModel", report)
    with pytest.raises(ValueError, match=r"1 of another shape \(.*shared.weight"):
        check_loading_report("here", "T5EncoderModel", report | {"mismatched_keys": {("shared.weight", (1,), (2,))}})
