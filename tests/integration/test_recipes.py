"""Every recipe runs, and every configuration is valid, says how to launch it, and has the values it claims to have."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from dina_reward.alignment import DiffusionGRPOConfig, DiffusionNFTConfig
from dina_reward.alignment.monitoring.evaluation import HISTORY_NAME, read_history
from dina_reward.recipes.configs import RecipeConfig, check_config, configs_of, parse_config
from dina_reward.shapes.alignment import alignment_config, nft_config


RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = configs_of(RECIPES)
EMBEDDED = [
    config
    for config in CONFIGS
    if config.model in ("shapes", "shapes-ddpm") and not config.name.startswith(("train_reward", "distill"))
]
WRITING = {"output_dir", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "eval_num_images"}

TRAINED_BY_ALL = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
}
SD35 = {
    **TRAINED_BY_ALL, "height": 512, "num_inference_steps": 10, "eval_num_inference_steps": 40, "lora_rank": 32,
    "lora_alpha": 64, "ema_decay": 0.9, "ema_update_every": 8, "train_full_model": False, "reward_noise_level": [0.4],
}  # fmt: skip
SD14 = {**TRAINED_BY_ALL, "height": 512, "num_inference_steps": 50, "sde_type": "ddim", "eta": 1.0, "guidance_scale": 5.0,
        "epsilon": 1e-4, "beta": 0.0, "sde_window_size": 49}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "flow_grpo_sd35_medium": {
        **SD35, "groups": (64, 18), "learning_rate": 5e-5, "epsilon": 3e-6, "beta": 0.004, "guidance_scale": 1.0,
        "sde_type": "cps", "eta": 0.8, "sde_window_size": 3, "sde_window_range": [0, 5],
    },
    "flow_grpo_sd35_medium_fast": {
        **SD35, "groups": (64, 18), "learning_rate": 3e-4, "epsilon": 1e-5, "beta": 0.0, "guidance_scale": 1.0,
        "sde_type": "cps", "eta": 0.8, "sde_window_size": 3, "sde_window_range": [0, 5],
    },
    "flow_grpo_sd35_medium_full": {
        **SD35, "groups": (48, 24), "learning_rate": 3e-4, "epsilon": 1e-4, "beta": 0.04, "guidance_scale": 4.5,
        "sde_type": "flow_sde", "eta": 0.7, "sde_window_size": 5,
    },
    "grpo_guard_sd35_medium": {
        **SD35, "groups": (48, 24), "learning_rate": 1e-4, "epsilon": 2e-6, "beta": 0.0, "guidance_scale": 4.5,
        "sde_type": "flow_sde", "eta": 0.7, "loss_type": "grpo_guard",
    },
    "flow_grpo_flux1_dev": {
        **TRAINED_BY_ALL, "height": 512, "groups": (48, 24), "num_inference_steps": 6, "eval_num_inference_steps": 28,
        "guidance_scale": 3.5, "learning_rate": 3e-4, "epsilon": 1e-4, "beta": 0.0, "eta": 0.9, "lora_rank": 64,
        "lora_alpha": 128, "ema_decay": 0.9, "ema_update_every": 8,
    },
    "dance_grpo_flux1_dev": {
        **TRAINED_BY_ALL, "height": 720, "groups": (32, 12), "num_inference_steps": 16, "guidance_scale": 3.5,
        "learning_rate": 1e-5, "epsilon": 1e-4, "sde_type": "dance_sde", "eta": 0.3, "train_timestep_fraction": 0.6,
        "ema_decay": 0.995, "train_full_model": True,
    },
    "ddpo_sd14": {**SD14, "groups": (256, 1), "learning_rate": 3e-4, "lora_rank": 4},
    "dance_grpo_sd14": {
        **SD14, "groups": (16, 16), "learning_rate": 1e-5, "train_full_model": True, "train_timestep_fraction": 0.6,
    },
}  # fmt: skip


def parse(config: RecipeConfig, *overrides: str) -> tuple[Any, Any]:
    launch = config.launch
    assert launch is not None
    arguments, training_args = parse_config(config, launch, overrides, RECIPES)
    return arguments, training_args


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_config_is_valid_as_its_header_launches_it(config: RecipeConfig) -> None:
    assert "valid for recipes/" in check_config(config, directory=RECIPES)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_config_says_what_it_is(config: RecipeConfig) -> None:
    header, launch = config.header, config.launch
    for word in ("Hardware:", "Launch:", "Override:"):
        assert any(line.startswith(word) for line in header), word
    assert launch is not None
    assert f"--config recipes/configs/{config.path.name}" in " ".join(header)
    assert config.title.endswith(".")
    assert len(config.title) < 100


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_values(name: str) -> None:
    config = RecipeConfig(RECIPES / "configs" / f"{name}.yaml")
    arguments, training_args = parse(config)
    batch = training_args.geometry()
    expected = dict(PUBLISHED[name])
    assert (batch.groups, batch.num_generations) == expected.pop("groups")
    assert {field: getattr(training_args, field) for field in expected} == expected
    if training_args.train_full_model:
        # Weights that change cannot be shared, and updates of 1e-5 are lost in 16 bits.
        assert (arguments.share_backbone, arguments.torch_dtype) == (False, "float32")


@pytest.mark.parametrize(
    ("recipe", "config_class", "measured"),
    [
        ("flow_grpo_shapes", DiffusionGRPOConfig, partial(alignment_config, iterations=30)),
        ("nft_shapes", DiffusionNFTConfig, nft_config),
    ],
)
def test_recipe_equals_the_measured_run(recipe: str, config_class: Any, measured: Any) -> None:
    values: dict[str, Any] = yaml.safe_load((RECIPES / "configs" / f"{recipe}.yaml").read_text())
    names = {f.name for f in fields(config_class)}
    written = config_class(**{key: value for key, value in values.items() if key in names})
    run = measured(written.output_dir, seed=written.seed)
    different = {
        name: (getattr(written, name), getattr(run, name))
        for name in sorted(names - WRITING)
        if name not in ("run_name", "logging_dir") and str(getattr(written, name)) != str(getattr(run, name))
    }
    assert different == {}


def test_the_long_run_is_the_one_that_was_measured_beside_refreshes() -> None:
    """`nft_shapes_long` is the entry KL of `compare_refresh.py`: what `nft_shapes_refresh` says, without a judge."""
    long, refreshed = (
        yaml.safe_load((RECIPES / "configs" / f"{name}.yaml").read_text())
        for name in ("nft_shapes_long", "nft_shapes_refresh")
    )
    kept = {key: value for key, value in refreshed.items() if not key.startswith("refresh_")}
    assert long == {**kept, "beta_kl": 0.03, "output_dir": long["output_dir"]}


def one_of_each_script_by_default(configs: list[RecipeConfig]) -> Iterator[Any]:
    """All configurations; slow are those whose script an earlier one runs, and the scripts that take longest."""
    scripts: set[str] = {"ddpo", "refl", "grpo"}
    for config in configs:
        assert config.launch is not None
        again = config.launch.recipe in scripts
        scripts.add(config.launch.recipe)
        yield pytest.param(config, id=config.name, marks=[pytest.mark.slow] if again else [])


@pytest.mark.parametrize("config", one_of_each_script_by_default(EMBEDDED))
def test_every_embedded_recipe_runs(config: RecipeConfig, tmp_path: Path) -> None:
    launch = config.launch
    assert launch is not None
    arguments, training_args = parse(
        config,
        *("--output_dir", str(tmp_path), "--max_steps", "2", "--per_device_train_batch_size", "12"),
        *("--eval_strategy", "no", "--save_strategy", "no", "--max_eval_prompts", "2", "--eval_num_images", "0"),
        *("--eval_num_inference_steps", "2"),
    )
    script = RECIPES / f"{launch.recipe}.py"
    specification = importlib.util.spec_from_file_location(script.stem, script)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.main(arguments, training_args)

    lora = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    history = read_history(tmp_path / HISTORY_NAME)
    assert [record.step for record in history] == [0]
    assert {"reward", "fit", "cleanness"} <= set(history[0].metrics)
