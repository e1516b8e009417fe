"""Trainer arguments and an analytic reward that fit the tiny Stable Diffusion 3 pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment import (
    AlignmentTrainer,
    DDPOConfig,
    DDPOTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    RewardBackpropConfig,
    RewardBackpropTrainer,
)
from tests.tiny_models import tiny_sd3_pipeline, tiny_sd_pipeline


PIXELS = 32
LATENT_SHAPE = (16, 4, 4)
UNET: dict[str, Any] = {"sde_type": "ddim", "eta": 1.0, "max_sequence_length": None}
ALGORITHMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "grpo": (DiffusionGRPOTrainer, DiffusionGRPOConfig, {"beta": 0.1}),
    "ddpo": (
        DDPOTrainer,
        DDPOConfig,
        {**UNET, "num_generations": 1, "per_prompt_stat_tracking_min_count": 2, "guidance_scale": 1.0},
    ),
    "nft": (DiffusionNFTTrainer, DiffusionNFTConfig, {}),
    "online_dpo": (OnlineDPOTrainer, OnlineDPOConfig, {"num_generations": 3}),
    "backprop": (RewardBackpropTrainer, RewardBackpropConfig, {"num_generations": 1, "steps_per_generation": 1}),
}
"""Trainer, configuration and settings of every algorithm."""

PROMPTS = ["a cat", "a dog", "red", "blue", "one", "two"]


def tiny_pipeline() -> Any:
    """The tiny pipeline with fewer blocks and short prompts."""
    pipeline = tiny_sd3_pipeline(num_layers=2, dual_attention_layers=())
    pipeline.tokenizer_max_length = 8
    return pipeline


def closeness(latents: Tensor) -> Tensor:
    """Reward that is highest for latents whose elements are all 0.5."""
    return -((latents.float() - 0.5) ** 2).flatten(1).mean(1)


def tiny_config(output_dir: Path | str, cls: type = DiffusionGRPOConfig, **overrides: Any) -> Any:
    """Two optimizer steps per generation of 3 groups of 4, five sampling steps, a window of 2."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 4,
        "steps_per_generation": 2,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "num_inference_steps": 5,
        "sde_window_size": 2,
        "sde_window_range": [0, 4],
        "eval_num_inference_steps": 3,
        "eval_num_images": 4,
        "height": PIXELS,
        "width": PIXELS,
        "max_sequence_length": 8,
        "lora_rank": 2,
        "lora_alpha": 4,
        "ema_update_every": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 7,
    }
    return cls(**{**settings, **overrides})


def tiny_trainer(
    output_dir: Path | str,
    *,
    reward_funcs: Any = closeness,
    dtype: torch.dtype = torch.float32,
    eval_dataset: Any = None,
    eval_reward_funcs: Any = (),
    **overrides: Any,
) -> DiffusionGRPOTrainer:
    """A trainer around a fresh pipeline."""
    return DiffusionGRPOTrainer(
        tiny_pipeline().to(dtype),
        reward_funcs,
        tiny_config(output_dir, **overrides),
        PROMPTS,
        eval_dataset=eval_dataset,
        eval_reward_funcs=eval_reward_funcs,
    )


def lora_tensors(trainer: DiffusionGRPOTrainer) -> dict[str, Tensor]:
    """Copies of the trainable parameters."""
    return {
        name: parameter.detach().clone()
        for name, parameter in trainer.policy.denoiser.named_parameters()
        if parameter.requires_grad
    }


def logged(trainer: DiffusionGRPOTrainer, name: str) -> list[float]:
    """Every logged value of a metric, in order."""
    return [line[name] for line in trainer.state.log_history if name in line]


def algorithm_trainer(name: str, output_dir: Path | str, **overrides: Any) -> AlignmentTrainer:
    """The tiny trainer of an algorithm; settings of `tiny_config` that its configuration does not have are left out."""
    trainer_class, config_class, settings = ALGORITHMS[name]
    known = config_class.__dataclass_fields__
    config = tiny_config(
        output_dir,
        cls=lambda **values: config_class(**{key: value for key, value in values.items() if key in known}),
        **{**settings, **overrides},
    )
    pipeline = tiny_sd_pipeline() if name == "ddpo" else tiny_pipeline()
    return trainer_class(pipeline, closeness, config, PROMPTS)
