"""The recipes' configurations for the embedded world are the settings whose figures the README shows."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from dina_reward.alignment import DiffusionGRPOConfig
from dina_reward.shapes.alignment import alignment_config


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
WRITING = {"output_dir", "save_strategy", "save_steps", "save_total_limit", "logging_steps", "eval_num_images"}


def test_flow_grpo_recipe_equals_the_measured_run(tmp_path: Path) -> None:
    values: dict[str, Any] = yaml.safe_load((CONFIGS / "flow_grpo_shapes.yaml").read_text())
    names = {f.name for f in fields(DiffusionGRPOConfig)}
    recipe = DiffusionGRPOConfig(**{key: value for key, value in values.items() if key in names})
    measured = alignment_config(recipe.output_dir, seed=recipe.seed)
    different = {
        name: (getattr(recipe, name), getattr(measured, name))
        for name in sorted(names - WRITING)
        if name not in ("run_name", "logging_dir") and str(getattr(recipe, name)) != str(getattr(measured, name))
    }
    assert different == {}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_says_what_it_is(path: Path) -> None:
    header = path.read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    for word in ("Hardware:", "Launch:", "Override:"):
        assert any(word in line for line in header), word
