"""The autoencoder of the shapes world: its architecture, its training, and images to scaled latents and back."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from .degradations import degrade
from .prompts import sample_scenes
from .renderer import IMAGE_SIZE, render


LATENT_CHANNELS = 8
LATENT_SIZE = 8
DEGRADED_SHARE = 0.4
"""Share of degraded images in training, so that bad images keep their flaws through the autoencoder."""


def new_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder: (3, 32, 32) images to (8, 8, 8) latents."""
    return AutoencoderKL(
        block_out_channels=(12, 24, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def sample_images(count: int, generator: torch.Generator, degraded_share: float = DEGRADED_SHARE) -> Tensor:
    """Renders of training scenes, of which a share is degraded with random strength: (count, 3, 32, 32)."""
    seed = int(torch.randint(2**31, (), generator=generator))
    images = render(sample_scenes(count, "train", seed=seed), generator)
    degraded = round(degraded_share * count)
    strength = torch.rand(degraded, generator=generator)
    return torch.cat([degrade(images[:degraded], strength, generator), images[degraded:]])


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, batch_size: int = 256) -> Tensor:
    """Scaled latents, as a denoiser sees them, of images in [0, 1].

    latents = (mode(q(z | 2 * images - 1)) - shift_factor) * scaling_factor

    Args:
        vae (AutoencoderKL): the autoencoder.
        images (Tensor): images in [0, 1], shape (count, 3, 32, 32).
        batch_size (int): images per forward pass.

    Returns:
        Tensor: latents, shape (count, 8, 8, 8).
    """
    modes = [vae.encode(2 * batch - 1).latent_dist.mode() for batch in images.split(batch_size)]
    return (torch.cat(modes) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor, batch_size: int = 256) -> Tensor:
    """Images in [0, 1], shape (count, 3, 32, 32), of scaled latents (count, 8, 8, 8)."""
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    images = torch.cat([vae.decode(batch).sample for batch in latents.split(batch_size)])
    return (images / 2 + 0.5).clamp(0, 1)


def train_autoencoder(
    steps: int = 3200,
    batch_size: int = 16,
    learning_rate: float = 1.6e-3,
    kl_weight: float = 1e-3,
    seed: int = 0,
) -> AutoencoderKL:
    """Train an autoencoder on renders and measure its latents.

    loss = mean |x - decode(z)| + mean (x - decode(z))^2 + kl_weight * KL(q(z|x) || N(0, I)) / latent size

    The returned model's `scaling_factor` and `shift_factor` make the latents of renders zero mean and unit variance.

    Args:
        steps (int): optimizer steps.
        batch_size (int): images per step.
        learning_rate (float): peak of a one-cycle schedule.
        kl_weight (float): weight of the KL term, per latent element.
        seed (int): seeds the initial weights and every draw.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = new_autoencoder().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    with tqdm(range(steps), desc="autoencoder") as progress:
        for _ in progress:
            images = 2 * sample_images(batch_size, generator) - 1
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample(generator=generator)).sample
            error = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
            loss = error + kl_weight * posterior.kl().mean() / (LATENT_CHANNELS * LATENT_SIZE**2)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress.n % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}", error=f"{error.item():.4f}")
    return measure_latents(vae.eval(), generator)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, generator: torch.Generator, count: int = 2048) -> AutoencoderKL:
    """Set `shift_factor` and `scaling_factor` to the mean and inverse deviation of the latents of clean renders."""
    images = sample_images(count, generator, degraded_share=0.0)
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode_images(vae, images)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae


def reconstruction_psnr(vae: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1] against their reconstructions."""
    error = F.mse_loss(decode_latents(vae, encode_images(vae, images)), images)
    return float(-10 * torch.log10(error))
