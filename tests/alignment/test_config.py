from __future__ import annotations

import logging

import pytest
from trl import TrlParser

from dina_reward.alignment import DDPOConfig, DiffusionGRPOConfig, OnlineDPOConfig, RewardBackpropConfig
from dina_reward.search.distillation import SearchDistillationConfig
from tests.alignment.helpers import tiny_config


def test_derived_defaults(tmp_path):
    config = DiffusionGRPOConfig(str(tmp_path), use_cpu=True, gradient_accumulation_steps=3, epsilon=1e-5)
    assert config.steps_per_generation == 3
    assert config.epsilon_high == 1e-5
    assert config.sde_window_range == [0, 5]
    assert config.optimizer_steps_per_generation == 1
    assert DiffusionGRPOConfig(str(tmp_path), use_cpu=True, sde_window_size=None).sde_window_size == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_generations": 1}, "num_generations must be an integer of at least 2, got 1"),
        ({"num_generations": 4.0}, "num_generations must be an integer of at least 1, got 4.0"),
        ({"num_iterations": True}, "num_iterations must be an integer"),
        ({"eta": 0.0}, "eta is 0.0: a deterministic step has no log-probability"),
        ({"eta": "high"}, "eta must be a number"),
        ({"sde_type": "euler"}, "unknown sde_type 'euler'"),
        ({"sde_type": "ddim", "eta": 1.2}, "ddim takes 0 < eta <= 1"),
        ({"loss_type": "grpo_guard"}, "defined for sde_type flow_sde and dance_sde only, got 'cps'"),
        ({"sde_window_schedule": "late"}, "unknown sde_window_schedule 'late'"),
        ({"credit": "dense"}, "unknown credit 'dense'; choose one of terminal, gain"),
        ({"credit_discount": 1.5}, "credit_discount must be a number in"),
        ({"train_timestep_fraction": 0}, "train_timestep_fraction must be above 0"),
        ({"train_full_model": True, "load_in_4bit": True}, "exclude each other"),
        ({"num_generations": 5}, "Set steps_per_generation to 5 .* or num_generations to 4 or 6"),
        ({"kl_kind": "kl"}, "unknown kl_kind 'kl'; choose one of step, velocity, flow_grpo"),
        ({"loss_type": "dpo"}, "unknown loss_type 'dpo'"),
        ({"keep_per_group": 3}, "keep_per_group must be an even number of at most num_generations=4 .*, got 3"),
        ({"keep_per_group": 6}, "keep_per_group must be an even number of at most num_generations=4"),
        ({"keep_per_group": 2.0}, "keep_per_group must be an integer of at least 2, got 2.0"),
        ({"scale_rewards": "std"}, "unknown scale_rewards 'std'"),
        ({"multi_objective_aggregation": "sum"}, "unknown multi_objective_aggregation 'sum'"),
        ({"sde_window_range": [0, 5]}, "includes the last of 5 steps"),
        ({"sde_window_range": [0, 2], "sde_window_size": 3}, "does not fit into sde_window_range"),
        ({"sde_window_range": 3}, "must be two integers"),
        ({"reward_noise_level": [0.4, 1.2]}, "levels in \\[0, 1\\], got \\[0.4, 1.2\\]"),
        ({"reward_ensemble": "max"}, "unknown reward_ensemble 'max'"),
        ({"reward_weights": 2.0}, "reward_weights must be a list of numbers"),
        ({"ema_decay": 1.0}, "ema_decay must lie strictly between 0 and 1"),
        ({"beta": -1.0}, "beta must be a number in \\[0, inf\\], got -1.0"),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 3}, "one must be a multiple of the other"),
        ({"save_strategy": "steps", "save_steps": 3}, "save_steps is 3, .* make save_steps a multiple of 2"),
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3}, "make eval_steps a multiple of 2"),
        ({"max_steps": 3}, "max_steps is 3, but a generation batch spans 2 optimizer steps"),
        ({"loss_type": "policy_gradient"}, "needs on-policy data, but these settings make 2 optimizer steps"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number in \\[0, inf\\], got nan"),
        ({"learning_rate": -1e-3}, "learning_rate must be a number in"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number in"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be a number in"),
        ({"seed": 2**32}, "seed must be below"),
        ({"epsilon": 0}, "epsilon must be above 0"),
        ({"advantage_clip": 0.0}, "advantage_clip must be above 0"),
        ({"height": 10**6}, "height must be at most 16384"),
        ({"max_sequence_length": 10**6}, "at most 32768 tokens"),
        ({"lora_target_modules": []}, "lora_target_modules must be a list"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"remove_unused_columns": True}, "remove_unused_columns must stay false"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches and dispatch_batches must be off"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, overrides, message):
    if overrides.get("save_strategy") == "best":
        overrides = {**overrides, "metric_for_best_model": "eval_reward"}
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **overrides)


def test_late_sde_window_warns_about_leftover_noise(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        tiny_config(tmp_path, sde_type="flow_sde", eta=0.7)
    logging.getLogger("transformers").propagate = False
    assert "leaves white noise" in caplog.text


def test_yaml_and_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nnum_generations: 4\nreward_noise_level: 0.2\nlearning_rate: 1e-5\n"
    )
    parser = TrlParser((DiffusionGRPOConfig,))
    (config,) = parser.parse_args_and_config(["--config", str(file), "--reward_noise_level", "0.2", "0.5"])
    assert config.num_generations == 4
    assert config.reward_noise_level == [0.2, 0.5]
    assert config.learning_rate == 1e-5
    (config,) = TrlParser((DiffusionGRPOConfig,)).parse_args_and_config(["--config", str(file)])
    assert config.reward_noise_level == [0.2]


def test_unknown_keys_are_errors(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"output_dir: {tmp_path}\nnum_generation: 4\n")
    with pytest.raises(ValueError, match="num_generation"):
        TrlParser((DiffusionGRPOConfig,)).parse_args_and_config(["--config", str(file)])


def test_every_field_of_its_own_has_help():
    parser = TrlParser((DiffusionGRPOConfig,))
    own = set(DiffusionGRPOConfig.__annotations__)
    helped = {action.dest for action in parser._actions if action.help}
    assert own <= helped


def test_ddim_trains_all_steps_but_the_last():
    config = DiffusionGRPOConfig(
        "x", use_cpu=True, sde_type="ddim", eta=1.0, num_inference_steps=8, sde_window_size=None
    )
    assert config.sde_window_range == [0, 7]
    assert config.sde_window_size == 7


def test_ddpo_defaults_and_refusals(tmp_path):
    config = DDPOConfig(str(tmp_path), use_cpu=True)
    assert (config.num_generations, config.sde_type, config.eta, config.guidance_scale) == (1, "ddim", 1.0, 5.0)
    assert config.sde_window_size == 49
    with pytest.raises(ValueError, match="exceeds the buffer of 8 rewards"):
        DDPOConfig(str(tmp_path), use_cpu=True, per_prompt_stat_tracking_buffer_size=8)


def test_geometry_of_a_launch_with_more_processes(tmp_path):
    config = tiny_config(tmp_path)
    assert config.geometry(2).rows == 24
    assert config.geometry().rows == 12
    with pytest.raises(
        ValueError, match="12 rows .* x 1 processes .* num_generations 24.* Set steps_per_generation to 4"
    ):
        tiny_config(tmp_path, num_generations=24)


@pytest.mark.parametrize("cls", [OnlineDPOConfig, RewardBackpropConfig, SearchDistillationConfig])
def test_losses_of_more_than_single_samples_keep_whole_groups(tmp_path, cls):
    with pytest.raises(ValueError, match=f"keep_per_group does nothing under {cls.__name__}"):
        cls(str(tmp_path), use_cpu=True, num_generations=2, keep_per_group=2)
