"""The catalogue of recipes: headers, launch lines, and what validation finds without touching a weight."""

from __future__ import annotations

from pathlib import Path

import pytest

from dina_reward.recipes import configs as recipe_configs
from dina_reward.recipes.arguments import SHIPPED
from dina_reward.recipes.configs import (
    Launch,
    RecipeConfig,
    check_config,
    configs_of,
    find_config,
    find_directory,
    recipe_dataclasses,
)


RECIPES = Path(__file__).parents[2] / "recipes"
BODY = "model_name_or_path: m\nreward_model_path: r\ndataset_name: d\noutput_dir: o\nreport_to: none\n"


def write(
    tmp_path: Path, body: str, launch: str | None = "python recipes/flow_grpo.py --config c.yaml"
) -> RecipeConfig:
    path = tmp_path / "c.yaml"
    header = "# What it is.\n" + ("" if launch is None else f"# Launch:   {launch}\n")
    path.write_text(f"{header}\n{BODY}{body}", encoding="utf-8")
    return RecipeConfig(path)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python recipes/ddpo.py --config a.yaml --seed 1", Launch("ddpo", 1, ("--seed", "1"))),
        ("accelerate launch --num_processes 8 recipes/nft.py --beta 0 --config a.yaml", Launch("nft", 8, ("--beta", "0"))),
        ("torchrun --nproc_per_node 4 ./recipes/grpo.py", Launch("grpo", 4, ())),
    ],
)  # fmt: skip
def test_launch_line(command: str, expected: Launch) -> None:
    assert Launch.parse(command) == expected


def test_launch_line_over_several_lines(tmp_path: Path) -> None:
    config = write(
        tmp_path,
        "",
        "accelerate launch --num_processes 8 recipes/grpo.py \\\n#   --config c.yaml \\\n#   --seed 3\n# --beta 1",
    )
    assert config.launch == Launch("grpo", 8, ("--seed", "3"))
    assert (config.name, config.title, config.model) == ("c", "What it is.", "m")


def test_launch_line_without_a_recipe() -> None:
    with pytest.raises(ValueError, match="runs no recipes/NAME.py"):
        Launch.parse("python train.py")


def test_says_what_would_run(tmp_path: Path) -> None:
    config = write(tmp_path, "num_generations: 6\nper_device_train_batch_size: 9\nsteps_per_generation: 4\n")
    report = check_config(config, num_processes=8, directory=RECIPES)
    assert report.endswith(
        "valid for recipes/flow_grpo.py, "
        "8 processes x 9 x 4 = 288 samples = 48 groups of 6, 4 optimizer steps per generation"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("lora_rnak: 8\n", "unknown key 'lora_rnak' in the configuration; did you mean lora_rank?"),
        ("reward_noise_levels: [0.4]\n", "did you mean reward_noise_level?"),
        ("max_steps: [1]\n", "max_steps must be int, got [1]"),
        ("num_inference_steps: 1.5\n", "num_inference_steps must be int, got 1.5"),
        ("eta: -1\n", "eta must be a number in [0, inf], got -1"),
        ("sde_type: euler\n", "'euler'"),
        ("loss_type: ppo\n", "unknown loss_type 'ppo'; choose one of grpo_guard, policy_gradient, ppo_clip"),
        ("optim: adamm\n", "adamm"),
        (
            "num_generations: 7\nper_device_train_batch_size: 8\nsteps_per_generation: 6\n",
            "Set steps_per_generation to 7",
        ),
    ],
)
def test_faults_name_the_file_in_one_line(tmp_path: Path, body: str, message: str) -> None:
    config = write(tmp_path, body)
    with pytest.raises(ValueError) as caught:
        check_config(config, directory=RECIPES)
    text = str(caught.value)
    assert text.startswith(f"{config.path}: ")
    assert message in text
    assert "\n" not in text


def test_geometry_counts_the_processes_that_would_be_launched(tmp_path: Path) -> None:
    body = "num_generations: 16\nper_device_train_batch_size: 4\nsteps_per_generation: 1\n"
    launch = "accelerate launch --num_processes 4 recipes/flow_grpo.py --config c.yaml"
    assert "16 samples = 1 group of 16, 1 optimizer step per" in check_config(
        write(tmp_path, body, launch), directory=RECIPES
    )
    with pytest.raises(
        ValueError, match=r"12 rows .* 3 processes .* not divisible by num_generations 16.* to 4 .* 12 or 6"
    ):
        check_config(write(tmp_path, body, launch), num_processes=3, directory=RECIPES)


def test_options_of_the_launch_line_and_further_ones_count(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "# T.\n# Launch: python recipes/flow_grpo.py --config c.yaml --dataset_name d\n\nmodel_name_or_path: m\n"
    )
    with pytest.raises(ValueError, match="required: --reward_model_path"):
        check_config(RecipeConfig(path), directory=RECIPES)
    assert "valid" in check_config(RecipeConfig(path), overrides=["--reward_model_path", "r"], directory=RECIPES)


def test_a_file_without_a_launch_line_needs_a_recipe(tmp_path: Path) -> None:
    config = write(tmp_path, "", launch=None)
    with pytest.raises(ValueError, match="give --recipe NAME"):
        check_config(config, directory=RECIPES)
    assert "recipes/ddpo.py" in check_config(config, recipe="ddpo", directory=RECIPES)
    with pytest.raises(ValueError, match=r"no recipe .*ppo.py; there are: .*ddpo, .*flow_grpo"):
        check_config(config, recipe="ppo", directory=RECIPES)


def test_a_recipe_is_a_script_whose_main_takes_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text("def main(steps: int) -> None: ...\n")
    with pytest.raises(ValueError, match="must be annotated with the dataclasses"):
        recipe_dataclasses(tmp_path / "odd.py")
    types = recipe_dataclasses(RECIPES / "train_reward.py")
    assert [cls.__name__ for cls in types] == ["TrainRewardArguments", "LatentRewardTrainingConfig"]


def test_where_recipes_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_directory().resolve() == RECIPES
    (tmp_path / "recipes" / "configs").mkdir(parents=True)
    assert find_directory() == Path("recipes")
    # An installed package has no recipes beside it.
    monkeypatch.setattr(
        recipe_configs, "__file__", str(tmp_path / "site-packages" / "dina_reward" / "recipes" / "configs.py")
    )
    (tmp_path / "recipes" / "configs").rmdir()
    assert find_directory() == SHIPPED
    for config in configs_of(SHIPPED):
        assert config.launch is not None
        if config.launch.recipe != "benchmark_rewards":
            assert f"valid for recipes/{config.launch.recipe}.py" in check_config(config)
    with pytest.raises(ValueError, match="no recipes in"):
        find_directory(tmp_path)


def test_configs_are_found_by_name_or_path(tmp_path: Path) -> None:
    assert find_config("ddpo_sd14", RECIPES).path == RECIPES / "configs" / "ddpo_sd14.yaml"
    assert find_config("ddpo_sd14.yaml", RECIPES).name == "ddpo_sd14"
    assert find_config(str(write(tmp_path, "").path)).name == "c"
    with pytest.raises(ValueError, match="no configuration 'flow_grpo_shape'; did you mean flow_grpo_shapes?"):
        find_config("flow_grpo_shape", RECIPES)
