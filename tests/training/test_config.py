from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from trl import TrlParser

from dina_reward.alignment import DiffusionGRPOConfig
from dina_reward.training import LatentRewardTrainingConfig


def test_defaults_are_the_published_recipe(tmp_path: Path) -> None:
    config = LatentRewardTrainingConfig(output_dir=str(tmp_path), report_to="none")
    assert (config.learning_rate, config.weight_decay, config.max_grad_norm) == (5e-5, 0.01, 1.0)
    assert config.lr_scheduler_type == "constant"
    assert config.num_train_epochs == 1
    assert (config.loss_type, config.level_distribution) == ("thurstone_fidelity", "uniform")


def test_every_own_field_explains_itself() -> None:
    own = set(LatentRewardTrainingConfig.__annotations__)
    fields = LatentRewardTrainingConfig.__dataclass_fields__
    assert all(len(fields[name].metadata.get("help", "")) > 10 for name in own)


def test_reads_yaml_and_command_line(tmp_path: Path) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text(
        f"output_dir: {tmp_path}\nreport_to: none\nema_decay: 0.99\neval_ensemble_levels: null\nlearning_rate: 1e-4\n"
    )
    parser = TrlParser((LatentRewardTrainingConfig,))
    (config,) = parser.parse_args_and_config(["--config", str(yaml), "--level_distribution", "beta"])
    assert config.ema_decay == 0.99
    assert config.eval_ensemble_levels is None
    assert config.learning_rate == 1e-4
    assert config.level_sampler().distribution == "beta"


def test_unknown_keys_are_errors(tmp_path: Path) -> None:
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"output_dir: {tmp_path}\nlevel_distributions: beta\n")
    with pytest.raises(ValueError, match="level_distributions"):
        TrlParser((LatentRewardTrainingConfig,)).parse_args_and_config(["--config", str(yaml)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_type": "hinge"}, "unknown preference loss 'hinge'"),
        ({"margin": 1.0}, "belongs to the loss 'bradley_terry'"),
        ({"level_distribution": "gamma"}, "unknown level distribution 'gamma'"),
        ({"level_std": -1.0}, "std must be positive"),
        ({"eval_noise_levels": []}, "eval_noise_levels is empty"),
        ({"eval_noise_levels": [0.4, 400.0]}, r"eval_noise_levels must be noise levels in \[0, 1\]"),
        ({"eval_ensemble_levels": [0.4]}, "is no ensemble"),
        ({"ema_decay": 1.0}, "ema_decay must lie strictly between 0 and 1"),
        ({"ema_update_every": 0}, "ema_update_every must be at least 1"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be false"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentRewardTrainingConfig(output_dir=str(tmp_path), report_to="none", **arguments)


@pytest.mark.parametrize("config", [LatentRewardTrainingConfig, DiffusionGRPOConfig])
def test_the_old_name_of_checkpointing_gives_no_warning(tmp_path: Path, config: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = config(str(tmp_path), report_to="none", use_cpu=True, gradient_checkpointing=True)
    assert args.gradient_checkpointing is True
    assert getattr(args, "activation_checkpointing", True) is True
