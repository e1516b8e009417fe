"""The flow-matching generator of the shapes world: a tiny Stable Diffusion 3 that draws well but listens badly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from dina_reward.noise.draws import fold_seed

from .autoencoder import LATENT_CHANNELS, LATENT_SIZE, encode_images
from .prompts import ATTRIBUTES, Scene, all_scenes, sample_scenes
from .renderer import render
from .text import HIDDEN_SIZE, MAX_PROMPT_TOKENS, PROJECTION_SIZE, new_text_encoder, new_tokenizer, new_word_encoder


SHIFT = 3.0
"""Static timestep shift of the scheduler, as in Stable Diffusion 3."""

CORRUPTION = 0.7
"""Chance that training re-draws an attribute of a caption in the end: the generator learns to trust each word little."""

CAPTION_DROPOUT = 0.1
"""Share of empty captions in training, which makes classifier-free guidance possible."""


@dataclass(frozen=True)
class Cycle:
    """One run of the learning rate schedule.

    Args:
        steps (int): optimizer steps.
        jitter (float): share of the renderer's placement range that the training images use.
        corruption (float): chance that an attribute of a caption is re-drawn.
    """

    steps: int
    jitter: float = 1.0
    corruption: float = CORRUPTION


CYCLES = (Cycle(2500, jitter=0.5, corruption=0.1), Cycle(2500, jitter=0.25, corruption=CORRUPTION))
"""The first cycle hears captions that are nearly right: a generator that is deaf from the start never binds words to
outlines, and neither does a reward on its blocks. The second one makes it hard of hearing, and sees narrower placements,
so that a tiny model learns sharp outlines."""


@dataclass(frozen=True)
class PromptEmbeddings:
    """What the text encoders make of a batch of prompts.

    Args:
        prompt_embeds (Tensor): token embeddings, shape (batch_size, tokens, 128).
        pooled_prompt_embeds (Tensor): pooled embeddings, shape (batch_size, 128).
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def __getitem__(self, rows: Tensor) -> PromptEmbeddings:
        return PromptEmbeddings(self.prompt_embeds[rows], self.pooled_prompt_embeds[rows])


def new_pipeline(vae: AutoencoderKL, seed: int = 0) -> StableDiffusion3Pipeline:
    """A pipeline around `vae` with an untrained transformer of 2 M parameters and random text encoders."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=24,
        num_attention_heads=4,
        caption_projection_dim=96,
        joint_attention_dim=2 * HIDDEN_SIZE,
        pooled_projection_dim=2 * PROJECTION_SIZE,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    tokenizers = [new_tokenizer(), new_tokenizer(), new_tokenizer(bos=False)]
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        tokenizer=tokenizers[0],
        text_encoder=new_text_encoder(tokenizers[0], seed=seed + 1),
        tokenizer_2=tokenizers[1],
        text_encoder_2=new_text_encoder(tokenizers[1], seed=seed + 2),
        tokenizer_3=tokenizers[2],
        text_encoder_3=new_word_encoder(tokenizers[2], seed=seed + 3),
    )


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusion3Pipeline, prompts: Sequence[str]) -> PromptEmbeddings:
    """Encode prompts, each different one once, without a negative prompt."""
    unique = list(dict.fromkeys(prompts))
    embeds, _, pooled, _ = pipeline.encode_prompt(
        unique, None, None, do_classifier_free_guidance=False, max_sequence_length=MAX_PROMPT_TOKENS
    )
    return PromptEmbeddings(embeds, pooled)[torch.tensor([unique.index(prompt) for prompt in prompts])]


@torch.no_grad()
def sample_latents(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    generator: torch.Generator,
    num_inference_steps: int = 10,
    eta: float = 0.0,
    batch_size: int = 256,
) -> Tensor:
    """Draw scaled latents by coefficient-preserving sampling, without guidance.

    With s' the next noise level and g = s' sin(eta pi / 2):
        x' = (1 - s') x0 + sqrt(s'^2 - g^2) x1 + g eps

    Args:
        pipeline (StableDiffusion3Pipeline): the generator.
        prompts (Sequence[str]): one prompt for each latent.
        generator (torch.Generator): draws the noise.
        num_inference_steps (int): sampler steps.
        eta (float): share of fresh noise, 0 (Euler steps of the ODE) to 1.
        batch_size (int): latents per forward pass.

    Returns:
        Tensor: latents, shape (len(prompts), 8, 8, 8).
    """
    embeddings = encode_prompts(pipeline, prompts)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    sigmas = scheduler.sigmas.tolist()
    samples = []
    for rows in torch.arange(len(prompts)).split(batch_size):
        text = embeddings[rows]
        x = torch.randn(len(rows), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator)
        for sigma, next_sigma in itertools.pairwise(sigmas):
            velocity = predict_velocity(pipeline.transformer, x, torch.full((len(rows),), sigma), text)
            clean, noise = x - sigma * velocity, x + (1 - sigma) * velocity
            fresh = next_sigma * math.sin(eta * math.pi / 2)
            x = (1 - next_sigma) * clean + math.sqrt(next_sigma**2 - fresh**2) * noise
            if fresh > 0:
                x = x + fresh * torch.randn(x.shape, generator=generator)
        samples.append(x)
    return torch.cat(samples)


def predict_velocity(transformer: SD3Transformer2DModel, x: Tensor, sigma: Tensor, text: PromptEmbeddings) -> Tensor:
    """The predicted velocity, noise minus clean latent, at noise levels `sigma` of shape (batch_size,)."""
    return transformer(
        hidden_states=x,
        timestep=1000 * sigma,
        encoder_hidden_states=text.prompt_embeds,
        pooled_projections=text.pooled_prompt_embeds,
        return_dict=False,
    )[0]


def corrupt_captions(scenes: Tensor, corruption: float, generator: torch.Generator) -> Tensor:
    """Re-draw each attribute of training scenes with probability `corruption`, never making a held-out scene.

    Args:
        scenes (Tensor): attribute indices, shape (batch_size, 4).
        corruption (float): 0 keeps everything, 1 re-draws everything.
        generator (torch.Generator): makes the draws.

    Returns:
        Tensor: attribute indices of training scenes, shape (batch_size, 4).
    """
    corrupted = scenes.clone()
    pending = torch.arange(len(scenes))
    while len(pending):
        redrawn = torch.stack(
            [torch.randint(len(values), (len(pending),), generator=generator) for values in ATTRIBUTES.values()], dim=1
        )
        keep = torch.rand(redrawn.shape, generator=generator) >= corruption
        corrupted[pending] = torch.where(keep, scenes[pending], redrawn)
        held_out = [Scene.from_indices(row).held_out for row in corrupted[pending].tolist()]
        pending = pending[torch.tensor(held_out)]
    return corrupted


def sample_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels for training, logit-normal with a lean towards noise, shape (count,)."""
    return torch.sigmoid(0.5 + 1.2 * torch.randn(count, generator=generator))


def pad_text(text: PromptEmbeddings, tokens: int) -> PromptEmbeddings:
    """`text` as `encode_prompt` would give it with a `max_sequence_length` longer by `tokens`."""
    return PromptEmbeddings(F.pad(text.prompt_embeds, (0, 0, 0, tokens)), text.pooled_prompt_embeds)


@dataclass(frozen=True)
class GeneratorTraining:
    """How a generator is trained on renders of training scenes with corrupted captions.

    Args:
        cycles (Sequence[Cycle]): runs of the learning rate schedule; each starts from the moving average of the
            weights of the one before.
        learning_rate (float): peak of each cycle's schedule.
        batch_size (int): latents per step.
        num_images (int): size of the pool of renders that each cycle draws from.
        compile (bool): whether `torch.compile` makes the steps faster, which takes a C++ compiler and a minute.
        seed (int): seeds the initial weights and every draw.
    """

    cycles: Sequence[Cycle]
    learning_rate: float
    batch_size: int = 64
    num_images: int = 16384
    compile: bool = False
    seed: int = 0

    @property
    def captions(self) -> list[str]:
        """The captions that training hears, in the order of the rows that `run` gives: every training scene, then none."""
        return [*(scene.caption for scene in all_scenes("train")), ""]

    def run(
        self,
        denoiser: torch.nn.Module,
        vae: AutoencoderKL,
        loss_of: Callable[[int, Tensor, Tensor, torch.Generator], Tensor],
    ) -> None:
        """Train a denoiser and leave the moving average of its weights in it, frozen.

        Args:
            denoiser (nn.Module): what is trained.
            vae (AutoencoderKL): encodes the renders.
            loss_of (Callable): gives the loss of a batch, called with the number of the step, clean latents, the rows
                of their captions and the generator for its own draws.
        """
        denoiser.train()
        scenes = sample_scenes(self.num_images, "train", seed=self.seed)
        indices = torch.tensor([scene.indices for scene in scenes])
        captions = {scene.indices: row for row, scene in enumerate(all_scenes("train"))}
        for number, cycle in enumerate(self.cycles):
            draws = torch.Generator().manual_seed(fold_seed(self.seed, number))
            latents = encode_images(vae, render(scenes, draws, jitter=cycle.jitter))

            def loss(
                step: int, latents: Tensor = latents, draws: torch.Generator = draws, cycle: Cycle = cycle
            ) -> Tensor:
                rows = torch.randint(len(latents), (self.batch_size,), generator=draws)
                heard = sample_captions(captions, indices[rows], cycle.corruption, draws)
                return loss_of(step, latents[rows], heard, draws)

            train_cycle(denoiser, loss, cycle.steps, self.learning_rate)
        denoiser.eval().requires_grad_(False)


def train_generator(vae: AutoencoderKL, **settings: Any) -> StableDiffusion3Pipeline:
    """Train the transformer by flow matching on renders of training scenes with corrupted captions.

    loss = mean |v(x_s, s, caption) - (noise - x0)|^2,  x_s = (1 - s) x0 + s noise

    Args:
        vae (AutoencoderKL): the trained autoencoder.
        settings: fields of `GeneratorTraining`.

    Returns:
        StableDiffusion3Pipeline: the pipeline with the exponential moving average of the weights.
    """
    training = GeneratorTraining(**{"cycles": CYCLES, "learning_rate": 1.5e-3, **settings})
    pipeline = new_pipeline(vae, training.seed)
    table = encode_prompts(pipeline, training.captions)
    predict_usual = torch.compile(predict_velocity, dynamic=False) if training.compile else predict_velocity

    def loss_of(step: int, clean: Tensor, captions: Tensor, draws: torch.Generator) -> Tensor:
        extra = _extra_tokens(step)
        text, predict = pad_text(table[captions], extra), predict_velocity if extra else predict_usual
        sigma = sample_sigmas(len(clean), draws)
        noise = torch.randn(clean.shape, generator=draws)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        return F.mse_loss(predict(pipeline.transformer, noisy, sigma, text), noise - clean)

    training.run(pipeline.transformer, vae, loss_of)
    return pipeline


def train_cycle(denoiser: torch.nn.Module, loss_of: Callable[[int], Tensor], steps: int, learning_rate: float) -> None:
    """One run of the learning rate schedule; leaves the moving average of the weights in the denoiser.

    Args:
        denoiser (nn.Module): what is trained.
        loss_of (Callable): draws a batch and gives its loss; called with the number of the step.
        steps (int): optimizer steps.
        learning_rate (float): peak of the schedule.
    """
    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    ema = EMAModel(denoiser.parameters(), decay=0.998, foreach=True)
    progress = tqdm(range(steps), desc="generator")
    average = 0.0
    for step in progress:
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(denoiser.parameters())
        average = loss.item() if step == 0 else 0.99 * average + 0.01 * loss.item()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{average:.4f}")
    ema.copy_to(denoiser.parameters())


def sample_captions(
    captions: Mapping[tuple[int, ...], int], scenes: Tensor, corruption: float, generator: torch.Generator
) -> Tensor:
    """Rows of the captions that training pairs with images of `scenes`: some corrupted, some empty.

    Args:
        captions (Mapping): for the attribute indices of a training scene, its row; the next row is the empty caption.
        scenes (Tensor): attribute indices, shape (batch_size, 4).
        corruption (float): chance that an attribute is re-drawn.
        generator (torch.Generator): makes the draws.

    Returns:
        Tensor: rows, shape (batch_size,).
    """
    heard = corrupt_captions(scenes, corruption, generator)
    rows = torch.tensor([captions[tuple(row)] for row in heard.tolist()])
    rows[torch.rand(len(rows), generator=generator) < CAPTION_DROPOUT] = len(captions)
    return rows


def _extra_tokens(step: int) -> int:
    """Padding tokens beyond the usual length: 0 but for a few steps, which teach the model to ignore padding."""
    if step % 200 == 199:
        return 256 - MAX_PROMPT_TOKENS
    return 16 if step % 40 == 9 else 0
