"""`dina-reward align`: the recipes' algorithms by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dina_reward import alignment
from dina_reward.cli.app import app
from dina_reward.recipes import alignment as recipes
from dina_reward.recipes.alignment import ALGORITHMS, RecipeArguments
from dina_reward.recipes.configs import recipe_dataclasses


ROOT = Path(__file__).parents[2]
SCRIPTS = {
    path.stem: path
    for path in sorted((ROOT / "recipes").glob("*.py"))
    if "from dina_reward.recipes import RecipeArguments, align" in path.read_text(encoding="utf-8")
}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["align", *map(str, arguments)])


def test_every_alignment_recipe_is_an_algorithm() -> None:
    assert ALGORITHMS.keys() == SCRIPTS.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_configuration_and_trainer_are_those_of_the_recipe(name: str) -> None:
    config, trainer = ALGORITHMS[name]
    assert recipe_dataclasses(SCRIPTS[name]) == (RecipeArguments, getattr(alignment, config))
    assert f"align({trainer}, arguments, config)" in SCRIPTS[name].read_text(encoding="utf-8")


def test_a_configuration_and_options_reach_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[Any, ...]] = []
    monkeypatch.setattr(recipes, "align", lambda *run: runs.append(run))
    config = ROOT / "recipes" / "configs" / "nft_shapes.yaml"
    result = invoke("nft", "--config", config, "--output_dir", tmp_path, "--seed", 7, "--use_cpu", "true")
    assert result.exit_code == 0, result.exception
    ((trainer, arguments, parsed),) = runs
    assert trainer is alignment.DiffusionNFTTrainer
    assert (arguments.model_name_or_path, arguments.reward_model_path) == ("shapes", "shapes")
    assert (parsed.output_dir, parsed.seed) == (str(tmp_path), 7)


def test_a_configurations_name_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[Any, ...]] = []
    monkeypatch.setattr(recipes, "align", lambda *run: runs.append(run))
    monkeypatch.chdir(tmp_path)
    for words in (["flow_grpo_shapes"], ["flow_grpo", "--config", "flow_grpo_shapes"]):
        result = invoke(*words, "--max_steps", 2, "--use_cpu", "true")
        assert result.exit_code == 0, result.exception
    for trainer, arguments, parsed in runs:
        assert trainer is alignment.DiffusionGRPOTrainer
        assert (arguments.dataset_name, parsed.max_steps, parsed.lora_rank > 0) == ("shapes", 2, True)
    assert len(runs) == 2
    for words, message in (
        (["train_reward_shapes"], "train_reward_shapes is a configuration of recipes/train_reward.py"),
        (["flow_grpo_sd35_medium"], "required: --dataset_name"),
        (["flow_grpo", "--config", "flow_grpo_shape"], "did you mean flow_grpo_shapes?"),
    ):
        assert message in str(invoke(*words).exception)


def test_mistakes_are_named() -> None:
    result = invoke("flow_gpro", "--config", "x.yaml")
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "no algorithm or configuration 'flow_gpro'; did you mean flow_grpo?"
    result = invoke("ppo")
    assert "there are flow_grpo, grpo, ddpo, nft, online_dpo, refl" in str(result.exception)
    result = invoke("ddpo", "--bta", "0.1")
    assert isinstance(result.exception, ValueError)
    assert "unknown option --bta" in str(result.exception)


def test_help_of_the_command_and_of_an_algorithm() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert "online_dpo" in result.output
    assert invoke().output == result.output
    result = invoke("refl", "--help")
    assert result.exit_code == 0
    assert "--reward_model_path" in result.output
