from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl import TrlParser

from dina_reward import LatentReward
from dina_reward.data import LatentRows
from dina_reward.recipes import reward_training as run
from tests.data.preference_files import npy, write_parquet
from tests.training.bucketed import embedded_rows
from tests.training.tiny_reward import separable_pairs, tiny_reward, training_config


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
    assert arguments.visual_taps is None or max(arguments.visual_taps) == arguments.num_layers
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


FLUX = {"num_layers": 19, "visual_taps": [8, 12, 16, 19], "head_width": 1536, "lora_r": 64}
POOLED = {"num_layers": 37, "visual_taps": [15, 23, 28, 37], "head_kind": "pooled", "likelihood": "bradley_terry"}


@pytest.mark.parametrize(
    ("name", "expected", "training"),
    [
        ("flux1_dev", FLUX, {"loss_type": "thurstone_fidelity"}),
        ("sd35_medium_qlora", {"load_in_4bit": True, "visual_taps": [4, 8, 12]}, {"optim": "adamw_bnb_8bit"}),
        ("dit_reward_sd35_large", POOLED, {"level_distribution": "constant", "level_value": 0.005}),
        ("drm_sd35", {"num_layers": 21, "visual_taps": [21], "head_kind": "conv"}, {"loss_type": "bradley_terry"}),
        ("sdxl", {"num_layers": 4, "visual_taps": [2, 3, 4]}, {"loss_type": "thurstone_fidelity"}),
    ],
)
def test_configs_of_neighbours(
    recipe: dict[str, Any], tmp_path: Path, name: str, expected: dict[str, Any], training: dict[str, Any]
) -> None:
    config = RECIPES / "configs" / f"train_reward_{name}.yaml"
    overrides = ["--dataset_name", "x", "--output_dir", str(tmp_path), "--use_cpu"]
    arguments, training_args = parse(recipe, ["--config", str(config), *overrides])
    assert {key: getattr(arguments, key) for key in expected} == expected
    assert {key: getattr(training_args, key) for key in training} == training
    assert (arguments.likelihood == "bradley_terry") == (training_args.loss_type == "bradley_terry")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"head_kind": "mlp"}, "unknown head kind 'mlp'"),
        ({"likelihood": "gumbel"}, "unknown likelihood 'gumbel'"),
        ({"head_kind": "conv", "use_text_features": True}, "reads image tokens alone"),
        ({"noise_level": []}, "noise_level is empty"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(
    overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run.TrainRewardArguments("model", "dataset", **overrides)


def test_what_is_left_open_is_the_default_for_the_model(sd3_pipeline: Any) -> None:
    from dina_reward.modeling import default_reward_config

    config = run.reward_config(run.TrainRewardArguments("model", "dataset"), sd3_pipeline)
    default = default_reward_config(sd3_pipeline)
    assert (config.num_layers, config.visual_taps) == (default.num_layers, default.visual_taps)
    assert config.head == default.head
    arguments = run.TrainRewardArguments(
        "model", "dataset", num_layers=2, visual_taps=[2], head_kind="pooled", head_width=24, noise_level=[0.005]
    )
    config = run.reward_config(arguments, sd3_pipeline)
    assert (config.head.kind, config.head.width, config.text_taps, config.noise_level) == ("pooled", 24, (), 0.005)
    with pytest.raises(ValueError, match="give both, or neither"):
        run.reward_config(run.TrainRewardArguments("model", "dataset", num_layers=2), sd3_pipeline)


def test_no_text_encoder_is_loaded_for_encoded_prompts(sd3_pipeline: Any, tmp_path: Path) -> None:
    import datasets

    sd3_pipeline.save_pretrained(tmp_path / "pipeline")
    rows = embedded_rows(sd3_pipeline, tiny_reward(pipeline=sd3_pipeline), 8)
    lists = [
        {key: value.tolist() if hasattr(value, "tolist") else value for key, value in row.items()} for row in rows
    ]
    datasets.Dataset.from_list(lists).save_to_disk(str(tmp_path / "pairs"))
    arguments = run.TrainRewardArguments(
        str(tmp_path / "pipeline"), str(tmp_path / "pairs"), dataset_test_split="train", max_eval_pairs=4, num_layers=2,
        visual_taps=[1, 2], lora_r=4, lora_alpha=8, max_sequence_length=8,
    )  # fmt: skip
    pipeline, pairs, held_out = run.load_inputs(arguments, seed=0)
    assert pipeline.text_encoder is pipeline.text_encoder_2 is pipeline.text_encoder_3 is None
    assert (len(pairs), len(held_out)) == (8, 4)
    run.train_reward(arguments, training_config(tmp_path / "out", max_steps=2, per_device_train_batch_size=4))
    assert (tmp_path / "out" / "evaluation.png").exists()


def published_latents(path: Path) -> Path:
    """Rows as the published reward was trained on, of two shapes; the last two have a prompt in common with others."""
    rows = []
    for number in range(10):
        size, shift = (16, 8, 8) if number % 2 else (16, 8, 12), 1.0 if number % 3 else -1.0
        latents = {
            side: npy(np.full(size, sign * shift, np.float16)) for side, sign in (("latent1", 1), ("latent2", -1))
        }
        shapes = {f"{side}_shape": list(size) for side in latents}
        rows.append({"prompt": f"prompt {number % 8}", **latents, **shapes, "detailed_results": None})
    return write_parquet(path, rows)


def test_published_latents_are_trained_on_as_they_are(sd3_pipeline: Any, tmp_path: Path) -> None:
    sd3_pipeline.save_pretrained(tmp_path / "pipeline")
    path = published_latents(tmp_path / "latents.parquet")
    arguments = run.TrainRewardArguments(
        str(tmp_path / "pipeline"), str(path), dataset_test_split=None, max_pairs_per_prompt=1, num_layers=2,
        visual_taps=[1, 2], lora_r=4, lora_alpha=8, max_sequence_length=8,
    )  # fmt: skip
    _, pairs, _ = run.load_inputs(arguments, seed=0)
    assert isinstance(pairs, LatentRows)
    assert len(pairs) == 8
    assert sorted(pairs.bucket_of.tolist()) == [0] * 4 + [1] * 4
    run.train_reward(arguments, training_config(tmp_path / "out", max_steps=4, per_device_train_batch_size=2))
    assert (tmp_path / "out" / "head.safetensors").exists()


@pytest.mark.parametrize("kind", ["file", "saved", "own"])
def test_one_set_of_pairs_is_not_trained_and_tested_on(tmp_path: Path, kind: str) -> None:
    import datasets

    if kind == "own":
        separable_pairs(4).save(tmp_path / "pairs")
    elif kind == "saved":
        datasets.Dataset.from_list([{"prompt": "p"}]).save_to_disk(str(tmp_path / "pairs"))
    else:
        published_latents(tmp_path / "pairs")
    arguments = run.TrainRewardArguments("x", str(tmp_path / "pairs"))
    with pytest.raises(ValueError, match="holds one set of pairs, which would be trained and tested on"):
        run.load_pairs(arguments, "train", None)


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
