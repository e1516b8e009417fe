from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from trl import TrlParser

from dina_reward.alignment import DiffusionGRPOConfig
from dina_reward.alignment.prompts import BatchGeometry


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    specification = importlib.util.spec_from_file_location("flow_grpo", RECIPES / "flow_grpo.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def parse(recipe: ModuleType, name: str, *overrides: str) -> tuple:
    parser = TrlParser((recipe.FlowGRPOArguments, DiffusionGRPOConfig))
    return parser.parse_args_and_config(["--config", str(RECIPES / "configs" / name), *overrides])


def geometry(config: DiffusionGRPOConfig, processes: int) -> BatchGeometry:
    return BatchGeometry(
        config.per_device_train_batch_size,
        processes,
        config.steps_per_generation,
        config.num_generations,
        config.num_iterations,
    )


def test_shapes_config(recipe, tmp_path):
    arguments, config = parse(recipe, "flow_grpo_shapes.yaml", "--output_dir", str(tmp_path))
    assert arguments.model_name_or_path == "shapes"
    batch = geometry(config, 1)
    assert (batch.rows, batch.groups) == (192, 16)
    assert config.sde_type == "cps"
    assert config.guidance_scale == 1
    assert config.reward_noise_level == [0.4]


def test_sd35_medium_config_has_the_published_values(recipe, tmp_path):
    _, config = parse(
        recipe,
        "flow_grpo_sd35_medium.yaml",
        *("--output_dir", str(tmp_path), "--dataset_name", "prompts", "--use_cpu", "true"),
    )
    batch = geometry(config, 8)
    assert (batch.rows, batch.groups, batch.num_generations) == (1152, 64, 18)
    published = {
        "learning_rate": 5e-5,
        "epsilon": 3e-6,
        "beta": 0.004,
        "sde_type": "cps",
        "eta": 0.8,
        "sde_window_size": 3,
        "num_inference_steps": 10,
        "eval_num_inference_steps": 40,
        "guidance_scale": 1.0,
        "lora_rank": 32,
        "lora_alpha": 64,
        "ema_decay": 0.9,
        "ema_update_every": 8,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 1e-4,
        "max_grad_norm": 1.0,
    }
    assert {name: getattr(config, name) for name in published} == published


def test_configs_open_with_what_hardware_and_launch_line():
    for name in ("flow_grpo_shapes.yaml", "flow_grpo_sd35_medium.yaml"):
        header = (RECIPES / "configs" / name).read_text(encoding="utf-8").split("\n\n")[0]
        assert all(line.startswith("#") for line in header.splitlines())
        assert all(word in header for word in ("Hardware:", "Launch:", "Override:"))


def test_prompts_from_a_folder_and_bad_dtype(recipe, tmp_path):
    (tmp_path / "train.txt").write_text("a cat\n\n a dog \n", encoding="utf-8")
    arguments = recipe.FlowGRPOArguments("shapes", "shapes", str(tmp_path), torch_dtype="float33")
    assert recipe.load_prompts(arguments, "train", seed=0) == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="torch_dtype must name a torch dtype such as 'bfloat16', got 'float33'"):
        recipe.load_models(arguments, "cpu")
