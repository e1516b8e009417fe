"""A policy around the tiny Stable Diffusion 3 pipeline, and what tests do with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.policy import Policy
from tests.tiny_models import tiny_sd3_pipeline


DEVICE = torch.device("cpu")
LATENT_SHAPE = (16, 4, 4)


def tiny_pipeline(**overrides: Any) -> Any:
    """The tiny pipeline with fewer blocks and short prompts."""
    pipeline = tiny_sd3_pipeline(**{"num_layers": 2, "dual_attention_layers": (), **overrides})
    pipeline.tokenizer_max_length = 8
    return pipeline


def make_policy(rank: int = 2, dtype: torch.dtype = torch.float32, pipeline: Any = None, **kwargs: Any) -> Policy:
    """A policy around the tiny pipeline, or around another family's, with the same initial LoRA every time."""
    torch.manual_seed(0)
    length = 8 if pipeline is None else None
    pipeline = tiny_pipeline() if pipeline is None else pipeline
    return Policy(pipeline.to(dtype), rank=rank, alpha=2 * rank, max_sequence_length=length, **kwargs)


def randomise(policy: Policy) -> None:
    """Moves every trained tensor, as a long training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.denoiser.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def trained(policy: Policy) -> list[Tensor]:
    """Copies of the trained tensors."""
    return [p.detach().clone() for p in policy.denoiser.parameters() if p.requires_grad]


def velocity_of(policy: Policy, prompts: Any = ("a cat", "a dog"), model: Any = None) -> Tensor:
    latents = torch.randn((2, *LATENT_SHAPE), generator=torch.Generator().manual_seed(0)).to(policy.storage_dtype)
    bound = policy.bind(policy.encode(prompts, DEVICE), policy.encode_negative(DEVICE), model)
    with torch.no_grad():
        return bound(latents, torch.full((2,), 500.0))


def denoising_loss(policy: Policy, rows: slice = slice(None), channels: int = 16) -> Tensor:
    """Mean squared distance of two predictions to fixed targets; a smooth function of the weights."""
    generator = torch.Generator().manual_seed(2)
    shape = (2, channels, *LATENT_SHAPE[1:])
    latents, target = (torch.randn(shape, generator=generator).to(policy.storage_dtype) for _ in range(2))
    conditioning = policy.encode(["a cat", "a dog"], DEVICE)[rows]
    timestep = torch.tensor([300.0, 700.0])[rows]
    return (policy.bind(conditioning, None)(latents[rows], timestep) - target[rows]).square().mean()


def train_steps(policy: Policy, steps: int, learning_rate: float, channels: int = 16) -> list[float]:
    """Losses before each of some Adam steps, and after the last."""
    optimizer = torch.optim.Adam(policy.trainable_parameters().values(), lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = denoising_loss(policy, channels=channels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [*losses, denoising_loss(policy, channels=channels).item()]


def generate(pipeline: Any) -> Tensor:
    """Latents of three steps of the pipeline itself."""
    return pipeline(
        ["a cat"],
        height=32,
        width=32,
        num_inference_steps=3,
        guidance_scale=1.0,
        max_sequence_length=8,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
