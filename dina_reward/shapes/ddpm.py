"""The DDPM generator of the shapes world: a tiny Stable Diffusion 1.x that draws well but listens badly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import LATENT_CHANNELS, LATENT_SIZE
from .generator import CORRUPTION, Cycle, GeneratorTraining
from .text import HIDDEN_SIZE, new_text_encoder, new_tokenizer


CYCLES = (Cycle(2500, jitter=0.5, corruption=0.1), Cycle(2000, jitter=0.25, corruption=CORRUPTION))
"""As for the flow-matching generator."""


def new_ddpm_pipeline(vae: AutoencoderKL, seed: int = 0) -> StableDiffusionPipeline:
    """A pipeline around `vae` with an untrained UNet of 1.1 M parameters and a random text encoder.

    Stable Diffusion 1.x has no latent shift, so the pipeline's autoencoder gets a copy of `vae` without it.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    tokenizer = new_tokenizer()
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    unshifted = AutoencoderKL.from_config({**config, "shift_factor": None})
    unshifted.load_state_dict(vae.state_dict())
    return StableDiffusionPipeline(
        vae=unshifted.eval().requires_grad_(False),
        text_encoder=new_text_encoder(tokenizer, seed=seed + 1, projection=False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Token embeddings, shape (len(prompts), 6, 64); each different prompt is encoded once, without a negative one."""
    unique = list(dict.fromkeys(prompts))
    embeds, _ = pipeline.encode_prompt(unique, pipeline.device, 1, do_classifier_free_guidance=False)
    return embeds[torch.tensor([unique.index(prompt) for prompt in prompts])]


@torch.no_grad()
def sample_ddim_latents(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    generator: torch.Generator,
    num_inference_steps: int = 15,
    eta: float = 0.0,
    batch_size: int = 256,
) -> Tensor:
    """Draw scaled latents by DDIM steps (arXiv 2010.02502), without guidance.

    Args:
        pipeline (StableDiffusionPipeline): the generator.
        prompts (Sequence[str]): one prompt for each latent.
        generator (torch.Generator): draws the noise.
        num_inference_steps (int): sampler steps.
        eta (float): share of fresh noise, 0 (the ODE) to 1 (ancestral sampling).
        batch_size (int): latents per forward pass.

    Returns:
        Tensor: latents, shape (len(prompts), 8, 8, 8).
    """
    embeds = encode_prompts(pipeline, prompts)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    samples = []
    for rows in torch.arange(len(prompts)).split(batch_size):
        x = torch.randn(len(rows), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
        for t in scheduler.timesteps:
            epsilon = pipeline.unet(x, t, encoder_hidden_states=embeds[rows], return_dict=False)[0]
            x = scheduler.step(epsilon, t, x, eta=eta, generator=generator).prev_sample
        samples.append(x)
    return torch.cat(samples)


def train_ddpm_generator(vae: AutoencoderKL, **settings: Any) -> StableDiffusionPipeline:
    """Train the UNet to predict noise on renders of training scenes with corrupted captions.

    loss = mean |eps(x_t, t, caption) - noise|^2,  x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise

    Args:
        vae (AutoencoderKL): the trained autoencoder.
        settings: fields of `GeneratorTraining`.

    Returns:
        StableDiffusionPipeline: the pipeline with the exponential moving average of the weights.
    """
    training = GeneratorTraining(**{"cycles": CYCLES, "learning_rate": 2e-3, **settings})
    pipeline = new_ddpm_pipeline(vae, training.seed)
    unet, scheduler = pipeline.unet.to(memory_format=torch.channels_last), pipeline.scheduler
    table = encode_prompts(pipeline, training.captions)
    denoise = torch.compile(unet, dynamic=False) if training.compile else unet

    def loss_of(step: int, clean: Tensor, captions: Tensor, draws: torch.Generator) -> Tensor:
        timestep = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=draws)
        noise = torch.randn(clean.shape, generator=draws)
        noisy = scheduler.add_noise(clean, noise, timestep).contiguous(memory_format=torch.channels_last)
        return F.mse_loss(denoise(noisy, timestep, encoder_hidden_states=table[captions]).sample, noise)

    training.run(unet, pipeline.vae, loss_of)
    return pipeline
