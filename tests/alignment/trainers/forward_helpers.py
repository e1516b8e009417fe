"""Tiny trainers that learn from clean samples under fresh noise, of a flow-matching and of a DDPM pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.experience.maker import Experience
from dina_reward.alignment.trainers.base import AlignmentTrainer
from dina_reward.alignment.trainers.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from dina_reward.alignment.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from dina_reward.shapes.prompts import sample_prompts
from dina_reward.shapes.shipped import load_pipeline
from dina_reward.shapes.text import MAX_PROMPT_TOKENS
from tests.alignment.tiny_policy import tiny_pipeline


# What the tiny DDPM pipeline needs in place of the defaults below.
DDPM_SETTINGS: dict[str, Any] = {"max_sequence_length": 16}
PROMPTS = ["a cat", "a dog", "red", "blue", "one", "two"]


def closeness(latents: Tensor) -> Tensor:
    """Reward that is highest for latents whose elements are all 0.5."""
    return -((latents.float() - 0.5) ** 2).flatten(1).mean(1)


def forward_settings(output_dir: Path | str, **overrides: Any) -> dict[str, Any]:
    """Two optimizer steps per generation of 4 groups of 4, three sampling steps, two training levels."""
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 12,
        "steps_per_generation": 2,
        "num_generations": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "num_inference_steps": 3,
        "num_train_timesteps": 2,
        "eval_num_inference_steps": 3,
        "eval_num_images": 0,
        "height": 32,
        "width": 32,
        "max_sequence_length": 8,
        "lora_rank": 2,
        "lora_alpha": 4,
        "ema_decay": None,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 7,
    }
    return {**settings, **overrides}


def nft_trainer(
    output_dir: Path | str, *, pipeline: Any = None, reward: Any = closeness, prompts: Any = PROMPTS, **overrides: Any
) -> DiffusionNFTTrainer:
    args = DiffusionNFTConfig(**forward_settings(output_dir, **overrides))
    pipeline = tiny_pipeline() if pipeline is None else pipeline
    return DiffusionNFTTrainer(pipeline, reward, args, prompts, eval_dataset=prompts)


def dpo_trainer(
    output_dir: Path | str, *, pipeline: Any = None, reward: Any = closeness, prompts: Any = PROMPTS, **overrides: Any
) -> OnlineDPOTrainer:
    args = OnlineDPOConfig(**forward_settings(output_dir, **overrides))
    pipeline = tiny_pipeline() if pipeline is None else pipeline
    return OnlineDPOTrainer(pipeline, reward, args, prompts, eval_dataset=prompts)


def first_channel(latents: Tensor) -> Tensor:
    """Reward that grows with the first latent channel."""
    return latents.float()[:, 0].mean(dim=(1, 2))


def embedded_run(**overrides: Any) -> dict[str, Any]:
    """Arguments of a trainer of the embedded generator: only of a trained one do samples fit its forward process."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {
        "pipeline": pipeline,
        "reward": first_channel,
        "prompts": sample_prompts(12, "train", seed=0),
        "max_sequence_length": MAX_PROMPT_TOKENS,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 12,
        "steps_per_generation": 1,
        "num_generations": 8,
        "num_inference_steps": 4,
        "eval_num_inference_steps": 4,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "lora_rank": 8,
        "lora_alpha": 16,
    }
    return {**settings, **overrides}


def trained_tensors(trainer: AlignmentTrainer) -> dict[str, Tensor]:
    """Copies of the trained parameters."""
    return {name: p.detach().clone() for name, p in trainer.policy.trainable_parameters().items()}


def perturb(trainer: AlignmentTrainer, scale: float = 0.3) -> None:
    """Moves every trained parameter, as a long training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.policy.trainable_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def predictions(trainer: AlignmentTrainer, experience: Experience, noisy: Tensor, timestep: Tensor) -> Tensor:
    """What the policy says now about noisy latents of a micro-batch, without gradient."""
    with torch.no_grad():
        return trainer.policy.bind(experience.conditioning_rows(), experience.negative)(noisy, timestep)


def logged(trainer: AlignmentTrainer, name: str) -> list[float]:
    """Every logged value of a metric, in order."""
    return [line[name] for line in trainer.state.log_history if name in line]


def check_only_the_lora_is_trained(trainer: AlignmentTrainer) -> None:
    """Trains, and asserts that gradient and change reach the LoRA and nothing else."""
    frozen = {n: p.detach().clone() for n, p in trainer.policy.denoiser.named_parameters() if not p.requires_grad}
    before = trained_tensors(trainer)
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "grad_norm"))
    parameters = dict(trainer.policy.denoiser.named_parameters())
    assert all(
        torch.equal(parameters[name], tensor) and parameters[name].grad is None for name, tensor in frozen.items()
    )
    assert any(not torch.equal(parameters[name], tensor) for name, tensor in before.items())
