"""What all clients need: scores of clean latents under noise that members of a group share, and of pixels where need be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentScorer:
    """Scores clean latents as a trainer wants them: detached, float32, under noise that depends on the prompt alone.

    Rows with equal prompts, which is what groups are, see the same noise, so that differences between them are not noise;
    and a row has the same score whatever it is batched with. Autocast of the caller is switched off inside.

    Args:
        reward: a `LatentReward`, or any callable with its signature.
        seed: the noise of a prompt depends on it.
        score_scale, score_bias: scores are ``score_scale * raw + score_bias``.
        options: further keyword arguments of `LatentReward.score`, such as ``noise_level=``.
    """

    reward: Callable[..., Tensor]
    seed: int = 0
    score_scale: float = 1.0
    score_bias: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, latents: Tensor, prompts: Sequence[str], **options: Any) -> Tensor:
        """Scores of a batch, without gradient.

        Args:
            latents: clean and scaled, shape ``(batch, ...)``; they are moved to the reward's device.
            prompts: one per latent, any sequence of strings.
            options: as for `LatentReward.score`.

        Returns:
            `Tensor`: shape ``(batch,)``, float32, on the device of ``latents``.

        Raises:
            ValueError: as `LatentReward.score`.
        """
        with torch.no_grad():
            return self.differentiable(latents, prompts, **options).detach()

    def differentiable(self, latents: Tensor, prompts: Sequence[str], **options: Any) -> Tensor:
        """As `__call__`, with the graph to ``latents`` where the reward has a `score` method."""
        prompts = [str(prompt) for prompt in prompts]
        given = {"seed": prompt_seeds(prompts, self.seed), **self.options, **options}
        if given.get("prompt_embeds") is not None:
            prompts = None  # type: ignore[assignment]
        device = getattr(self.reward, "device", latents.device)
        with (
            torch.autocast(latents.device.type, enabled=False),
            torch.autocast(torch.device(device).type, enabled=False),
        ):
            if torch.is_grad_enabled() and hasattr(self.reward, "score"):
                scores = self.reward.score(latents.to(device), prompts, **given).scores
            else:
                scores = self.reward(latents.to(device), prompts, **given)
        return (self.score_scale * scores.float() + self.score_bias).to(latents.device)

    def encode(self, images: Tensor | Sequence[Any]) -> Tensor:
        """Scaled latents of images, by the VAE of the reward's pipeline.

        Args:
            images: PIL images, or a tensor of shape ``(batch, 3, height, width)`` with values in [0, 1].

        Raises:
            ValueError: the reward was loaded without a pipeline that has a VAE.
        """
        pipeline = getattr(getattr(self.reward, "prompt_encoder", None), "pipeline", None)
        if getattr(pipeline, "vae", None) is None:
            raise ValueError(
                "these are pixels, and the reward has no autoencoder: load it with `pipeline=`, or hand over the latents "
                "that the pipeline returns for output_type='latent'"
            )
        return self.reward.family.encode_images(pipeline, [_pil(image) for image in images])  # type: ignore[attr-defined]


def prompt_seeds(prompts: Sequence[str], seed: int = 0) -> list[int]:
    """A noise seed of 63 bits for each prompt; equal prompts have equal seeds, in every process and on every machine."""
    return [
        int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:8], "big") >> 1 for prompt in prompts
    ]


def as_tuple_reward(
    reward: Callable[..., Tensor], *, seed: int = 0, score_scale: float = 1.0, score_bias: float = 0.0, **options: Any
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """The commonest shape of a reward function: ``fn(images, prompts, metadata) -> (scores, {})``.

    For TRL's `DDPOTrainer`, ddpo-pytorch, flow_grpo's entries and their kin, called from any thread. ``images`` are clean
    scaled latents; of images in [0, 1] (three channels) the latents are made by the reward's own pipeline.

    Args:
        reward: a `LatentReward`, or any callable with its signature.
        seed, score_scale, score_bias, options: as for `LatentScorer`.

    Examples:
        >>> score = as_tuple_reward(reward, noise_level=0.4)
        >>> score(latents, ("a cat", "a dog"), ({}, {}))
    """
    scorer = LatentScorer(reward, seed, score_scale, score_bias, options)

    def latent_reward(images: Tensor, prompts: Sequence[str], metadata: Any = None) -> tuple[Tensor, dict[str, Any]]:
        latents = scorer.encode(images) if is_pixels(images) else images
        return scorer(latents, prompts), {}

    return latent_reward


def is_pixels(images: Any) -> bool:
    """Whether these are images: PIL images, or a batch with three channels, which no latent has."""
    return not isinstance(images, Tensor) or (images.ndim == 4 and images.shape[1] == 3)


def _pil(image: Any) -> Any:
    from PIL import Image

    if not isinstance(image, Tensor):
        return image
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
