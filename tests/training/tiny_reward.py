"""A tiny untrained reward and preferences that are easy to tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from dina_reward.data import LatentPreferenceDataset
from dina_reward.modeling import LatentRewardConfig
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.reward import LatentReward
from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig
from tests.tiny_models import tiny_sd3_pipeline


LATENT_SHAPE = (16, 8, 8)


def tiny_reward(seed: int = 0, pipeline: Any | None = None, **overrides: Any) -> LatentReward:
    config = LatentRewardConfig(
        family="sd3", num_layers=2, visual_taps=(1, 2), text_taps=(1,), max_sequence_length=8, head=RewardHeadConfig()
    )
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v"])
    pipeline = pipeline or tiny_sd3_pipeline()
    return LatentReward.from_config(config, pipeline=pipeline, lora_config=lora, seed=seed, **overrides)


def separable_pairs(count: int = 64, seed: int = 0) -> LatentPreferenceDataset:
    """The chosen latent carries a constant shift of its first channels that the rejected one lacks."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, count, *LATENT_SHAPE, generator=generator)
    chosen[:, :4] += 1.5
    rejected[:, :4] -= 1.5
    prompts = [("a red circle", "a blue square")[index % 2] for index in range(count)]
    return LatentPreferenceDataset(prompts, chosen, rejected)


def training_config(output_dir: Path | str, **overrides: Any) -> LatentRewardTrainingConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "max_steps": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "eval_noise_levels": [0.1, 0.5],
        "eval_ensemble_levels": None,
    }
    return LatentRewardTrainingConfig(**{**defaults, **overrides})


def tiny_trainer(
    output_dir: Path | str,
    pipeline: Any | None = None,
    trainer_class: type[LatentRewardTrainer] = LatentRewardTrainer,
    **overrides: Any,
) -> LatentRewardTrainer:
    return trainer_class(
        tiny_reward(pipeline=pipeline),
        training_config(output_dir, **overrides),
        train_dataset=separable_pairs(),
        eval_dataset=separable_pairs(count=24, seed=1),
    )


def trained_parameters(trainer: LatentRewardTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.reward.model.trainable_state().items()}
