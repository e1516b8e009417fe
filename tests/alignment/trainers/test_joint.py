"""Timesteps of a sample that share a forward and a backward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward.alignment import (
    AlignmentTrainer,
    DDPOConfig,
    DiffusionGRPOConfig,
    DiffusionNFTConfig,
    OnlineDPOConfig,
)
from dina_reward.search import SearchDistillationConfig
from tests.alignment.helpers import algorithm_trainer, logged, lora_tensors, tiny_config
from tests.alignment.trainers.forward_helpers import forward_settings, perturb
from tests.search.test_distillation import trainer as search_distillation_trainer


WINDOW = {"sde_window_size": 4, "sde_window_range": [0, 4], "num_inference_steps": 6}
CASES: dict[str, dict[str, Any]] = {
    "grpo": {**WINDOW, "beta": 0.1, "credit": "gain", "guidance_scale": 2.0},
    "grpo, guard": {**WINDOW, "beta": 0.1, "loss_type": "grpo_guard", "sde_type": "flow_sde", "keep_per_group": 2},
    "ddpo": {**WINDOW, "sde_window_range": [0, 5]},
    "nft": {"num_train_timesteps": 4, "beta_kl": 0.1},
    "online_dpo": {"num_train_timesteps": 4, "loss_type": "soft", "label_smoothing": 0.1},
    "search_distillation": {"num_train_timesteps": 4, "weight_strength": 2.0},
}


def made(case: str, directory: Path, **overrides: Any) -> AlignmentTrainer:
    name, settings = case.split(",")[0], {**CASES[case], **overrides}
    if name == "search_distillation":
        return search_distillation_trainer(directory, **settings)
    return algorithm_trainer(name, directory, **settings)


@pytest.mark.parametrize("case", CASES)
def test_a_pass_has_the_mean_of_the_losses_of_its_timesteps(tmp_path: Path, case: str) -> None:
    together, apart = (made(case, tmp_path / str(n), timesteps_per_forward=n) for n in (2, 1))
    (experience, *_), _ = apart.make_experience(0)
    for trainer in (together, apart):
        perturb(trainer, 0.1)
    assert (together.num_losses(experience), apart.num_losses(experience)) == (2, 4)
    for position in range(2):
        joint = together.step_loss(together.model, experience, position)
        single = [apart.step_loss(apart.model, experience, 2 * position + number) for number in range(2)]
        torch.testing.assert_close(joint.loss, (single[0].loss + single[1].loss) / 2)
        assert joint.metrics.keys() == single[0].metrics.keys()
        for name, value in joint.metrics.items():
            values = torch.stack([each.metrics[name] for each in single])
            reduced = {"ratio/min": values.min(), "ratio/max": values.max()}.get(name, values.nanmean())
            torch.testing.assert_close(value, reduced, equal_nan=True)


def test_a_run_with_shared_passes_trains_and_counts_as_one_without(tmp_path: Path) -> None:
    runs = []
    for number in (1, 2):
        trainer = algorithm_trainer("grpo", tmp_path / str(number), timesteps_per_forward=number, max_steps=4)
        passes: list[int] = []
        trainer.policy.denoiser.register_forward_hook(lambda _m, _a, output, seen=passes: seen.append(len(output[0])))
        trainer.train()
        runs.append((trainer, sorted(passes)))
    (apart, single), (together, joint) = runs
    # Four micro-batches of six rows, two trained steps each; rollouts and references are the same.
    assert single.count(6) - joint.count(6) == 4 * 2
    assert joint.count(12) == 4
    assert together.costs.costs().calls == apart.costs.costs().calls
    assert logged(together, "reward") == pytest.approx(logged(apart, "reward"), abs=1e-4)
    for name, value in lora_tensors(together).items():  # type: ignore[arg-type]
        torch.testing.assert_close(value, lora_tensors(apart)[name], atol=2e-3, rtol=0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1),
        ({"keep_per_group": 2}, 2),
        ({"keep_per_group": 2, "num_train_timesteps": 3}, 1),
        ({"keep_per_group": 2, "num_train_timesteps": 6, "num_generations": 8}, 3),
        # Groups lie across micro-batches, so some of these have more rows than others.
        ({"keep_per_group": 2, "per_device_train_batch_size": 6}, 1),
        ({"keep_per_group": 2, "timesteps_per_forward": 1}, 1),
    ],
)
def test_timesteps_share_a_pass_where_rows_are_left_out(
    tmp_path: Path, settings: dict[str, Any], expected: int
) -> None:
    settings = {"num_train_timesteps": 4, **settings}
    assert DiffusionNFTConfig(**forward_settings(tmp_path, **settings)).joint_timesteps() == expected


def test_trained_timesteps_of_a_window(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **WINDOW, train_timestep_fraction=0.5)
    assert (config.trained_timesteps, config.joint_timesteps()) == (2, 1)
    kept = tiny_config(tmp_path, **WINDOW, keep_per_group=2, per_device_train_batch_size=8, steps_per_generation=1)
    assert (kept.trained_timesteps, kept.joint_timesteps(), list(kept.joint_positions(1))) == (4, 2, [2, 3])


@pytest.mark.parametrize(
    "config", [DiffusionGRPOConfig, DDPOConfig, DiffusionNFTConfig, OnlineDPOConfig, SearchDistillationConfig]
)
def test_a_number_that_does_not_divide_is_refused(tmp_path: Path, config: type) -> None:
    settings = {"num_generations": 2, "per_device_train_batch_size": 4, "use_cpu": True, "num_inference_steps": 9}
    with pytest.raises(ValueError, match=r"timesteps_per_forward is 5, which does not divide the \d timesteps"):
        config(str(tmp_path), timesteps_per_forward=5, **settings)
    with pytest.raises(ValueError, match="timesteps_per_forward must be an integer of at least 1"):
        config(str(tmp_path), timesteps_per_forward=0, **settings)
