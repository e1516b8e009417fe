"""The package as it is installed: built into a wheel, unpacked, and used far from any checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SMALL = ("--eval_strategy", "no", "--save_strategy", "no", "--max_eval_prompts", "2", "--eval_num_images", "0")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    ignored = shutil.ignore_patterns(".*", "tests", "docs", "build", "outputs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(root), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(root / "installed")
    return root / "installed"


def run(installed: Path, directory: Path, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr[-2000:]
    return result.stdout


def test_what_is_in_it(installed: Path) -> None:
    files = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    configs = {path.name for path in (ROOT / "recipes" / "configs").glob("*.yaml")}
    assert {f"dina_reward/recipes/shipped/configs/{name}" for name in configs} <= files
    assert "dina_reward/recipes/shipped/configs/accelerate/fsdp2.yaml" in files
    assert "dina_reward/shapes/weights/flow-reward/head.safetensors" in files
    assert not [name for name in files if name.startswith(("tests", "recipes", "examples"))]
    (metadata,) = installed.glob("*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: (\w+)[^;\n]*$", metadata.read_text(), re.MULTILINE)
    assert sorted(needed) == sorted(
        [
            "torch",
            "diffusers",
            "transformers",
            "peft",
            "accelerate",
            "huggingface_hub",
            "safetensors",
            "numpy",
            "pillow",
        ]
    )


def test_a_reward_by_name(installed: Path, tmp_path: Path) -> None:
    code = (
        "import dina_reward, torch\n"
        "reward = dina_reward.LatentReward.from_pretrained('shapes')\n"
        "pipe = __import__('dina_reward.shapes', fromlist=['x']).load_pipeline()\n"
        "reward = dina_reward.LatentReward.from_pretrained('shapes', pipeline=pipe)\n"
        "print(dina_reward.__file__, reward(torch.randn(2, 8, 8, 8), 'a large red circle', seed=0).shape)\n"
        "dina_reward.convert_checkpoint('shapes', 'native')\n"
    )
    assert run(installed, tmp_path, "-c", code).split(maxsplit=1) == [
        str(installed / "dina_reward" / "__init__.py"),
        "torch.Size([2])\n",
    ]
    assert (tmp_path / "native" / "head.safetensors").is_file()


def test_recipes_are_listed_and_run(installed: Path, tmp_path: Path) -> None:
    dina_reward = ("-m", "dina_reward.cli")
    listed = run(installed, tmp_path, *dina_reward, "recipes", "list")
    assert "flow_grpo_sd35_medium" in listed
    assert "valid" in run(installed, tmp_path, *dina_reward, "recipes", "validate", "flow_grpo_flux1_dev")
    small = (*SMALL, "--per_device_train_batch_size", "12", "--eval_num_inference_steps", "2")
    run(
        installed, tmp_path, *dina_reward, "align", "flow_grpo_shapes", "--max_steps", "2", "--output_dir", "a", *small
    )
    assert (tmp_path / "a" / "pytorch_lora_weights.safetensors").is_file()
    few = ("--max_steps", "1", "--max_train_pairs", "64", "--dataset_test_split", "null", "--eval_strategy", "no")
    few += ("--output_dir", "reward")
    run(installed, tmp_path, *dina_reward, "train", "train_reward_shapes", *few)
    assert (tmp_path / "reward" / "head.safetensors").is_file()
    run(installed, tmp_path, *dina_reward, "demo", "--iterations", "1", "--output", "demo")
    assert list((tmp_path / "demo").glob("*.png"))
