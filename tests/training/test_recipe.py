from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from trl import TrlParser

from dina_reward import LatentReward
from dina_reward.training import run
from tests.training.tiny_reward import separable_pairs


RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("train_reward_*.yaml"))


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    return vars(run)


def test_the_recipe_is_the_packaged_run() -> None:
    assert runpy.run_path(str(RECIPES / "train_reward.py"))["main"] is run.train_reward


def parse(recipe: dict[str, Any], arguments: list[str]) -> tuple[Any, Any]:
    parser = TrlParser((recipe["TrainRewardArguments"], recipe["LatentRewardTrainingConfig"]))
    return parser.parse_args_and_config(arguments)  # type: ignore[no-any-return]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_valid_and_say_how_to_launch_them(recipe: dict[str, Any], config: Path, tmp_path: Path) -> None:
    header = config.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert all(word in header for word in ("Hardware:", "Launch:", "Override:", config.name))
    overrides = ["--dataset_name", "x", "--output_dir", str(tmp_path), "--use_cpu"]
    arguments, training_args = parse(recipe, ["--config", str(config), *overrides])
    assert max(arguments.visual_taps) == arguments.num_layers
    assert arguments.lora_alpha == 2 * arguments.lora_r
    assert training_args.lr_scheduler_type in ("constant", "cosine")


def test_medium_config_is_the_published_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = RECIPES / "configs" / "train_reward_sd35_medium.yaml"
    overrides = ["--dataset_name", "x", "--output_dir", str(tmp_path), "--use_cpu"]
    arguments, training_args = parse(recipe, ["--config", str(config), *overrides])
    assert (arguments.num_layers, arguments.visual_taps) == (12, [4, 8, 12])
    assert (arguments.lora_r, arguments.lora_alpha) == (64, 128)
    assert (training_args.learning_rate, training_args.weight_decay) == (5e-5, 0.01)
    assert training_args.bf16
    assert training_args.max_grad_norm == 1.0
    assert training_args.num_train_epochs == 1


def test_unknown_key_is_an_error(recipe: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model_name_or_path: x\ndataset_name: y\nlora_rank: 4\n")
    with pytest.raises(ValueError, match="lora_rank"):
        parse(recipe, ["--config", str(config)])


def test_trains_saves_and_reports(
    recipe: dict[str, Any], sd3_pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sd3_pipeline.save_pretrained(tmp_path / "pipeline")
    separable_pairs(32).save(tmp_path / "pairs")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model_name_or_path: {tmp_path / 'pipeline'}\ndataset_name: {tmp_path / 'pairs'}\n"
        f"output_dir: {tmp_path / 'out'}\ndataset_test_split: train\nnum_layers: 2\nvisual_taps: [1, 2]\n"
        "lora_r: 4\nlora_alpha: 8\nmax_sequence_length: 8\nmax_steps: 20\nper_device_train_batch_size: 8\n"
        "learning_rate: 3e-3\nreport_to: none\nuse_cpu: true\nsave_steps: 10\nema_decay: 0.9\n"
        "dataloader_pin_memory: false\n"
    )
    recipe["train_reward"](*parse(recipe, ["--config", str(config), "--max_eval_pairs", "16"]))
    printed = capsys.readouterr().out
    assert "ensemble" in printed
    assert "16 of 16 pairs count" in printed
    assert (tmp_path / "out" / "evaluation.png").exists()
    assert (tmp_path / "out" / "checkpoint-20").is_dir()
    reward = LatentReward.from_pretrained(tmp_path / "out", pipeline=sd3_pipeline)
    pairs = separable_pairs(4)
    assert (reward(pairs.chosen, "a red circle", seed=0) > reward(pairs.rejected, "a red circle", seed=0)).all()
