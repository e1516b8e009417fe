"""What all clients need: scores of clean latents under noise that members of a group share, and of pixels where need be."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dina_reward.checks.tensors import check_numbers
from dina_reward.checks.values import check_number, checked_texts
from dina_reward.noise.draws import checked_seed


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

    def __post_init__(self) -> None:
        check_reward(self.reward)
        checked_seed(self.seed)
        check_number("score_scale", self.score_scale, -math.inf)
        check_number("score_bias", self.score_bias, -math.inf)

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
        check_numbers("latents", latents, floating=True)
        prompts = prompt_per_row(prompts)
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


def check_reward(reward: Any) -> None:
    """Refuses what cannot be called with latents, prompts and ``seed=``.

    Raises:
        ValueError: naming what was given.
    """
    check_callable("reward", reward)
    function = reward.forward if isinstance(reward, torch.nn.Module) else reward
    try:
        inspect.signature(function).bind(None, None, seed=None)
    except TypeError as error:
        raise ValueError(
            f"reward must be a LatentReward, or be called like one, reward(latents, prompts, seed=...); got {reward!r:.80}: "
            f"{error}"
        ) from None


def check_callable(name: str, value: Any) -> None:
    """Refuses what is no function; a class is none.

    Raises:
        ValueError: naming what was given.
    """
    if not callable(value) or isinstance(value, type):
        raise ValueError(f"{name} must be a function, got {value!r:.80} ({type(value).__name__})")


def prompt_per_row(prompts: Any) -> list[str]:
    """Prompts as clients hold them: a list, a tuple, an array of text; never one text, whose letters would be the rows'.

    Raises:
        ValueError: something else.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be one per latent, got the text {prompts!r:.80}; put it into a list")
    return checked_texts("prompts", prompts.tolist() if isinstance(prompts, np.ndarray) else prompts)


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
