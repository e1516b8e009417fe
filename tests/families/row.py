"""What the matrix needs to know about a family, and a family set up for one module of tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward import LatentRewardConfig
from dina_reward.families import Conditioning, ModelFamily, get_family
from dina_reward.modeling.heads.config import RewardHeadConfig


PROMPTS = ["a cat", "two dogs and a bird"]


def stream_pair(output: Any, _: Setup) -> tuple[Tensor, Tensor]:
    """Blocks that return (text, image)."""
    return output


def pipeline_images(output: Any) -> Any:
    """What a pipeline of images returns."""
    return output.images


def packed(setup: Setup, noise: Tensor) -> Tensor:
    """The layout of the pipeline."""
    return setup.family.pack_latents(noise)


def as_returned(_: Setup, latents: Tensor) -> Tensor:
    """What most pipelines return is in a layout of the family."""
    return latents


@dataclass(frozen=True)
class Row:
    """A family's row.

    Args:
        name: of the family.
        pipeline: ``pipeline(seed=0)`` builds a tiny random pipeline.
        latents: spatial shape of two latents, small and not square.
        num_layers, taps: of the tests' reward.
        blocks: backbone -> its blocks, in the order of their numbers.
        block_output: what a block returned in the full model, and the setup -> (text tokens, image tokens).
        pixels_per_side: images are cut to a multiple of this.
        arguments: of the pipeline's call without guidance.
        guidance_scale: of this package, in calls without classifier-free guidance.
        guided: guidance scale of this package and the pipeline's arguments that mean the same; ``None``: tested elsewhere.
        classifier_free: whether ``guided`` is classifier-free guidance rather than an input of the model.
        size: height and width in pixels for whole rollouts.
        num_frames: of a video.
        result: output of the pipeline -> images or latents.
        given: noise in the spatial layout -> what the pipeline takes as ``latents``.
        returned: latents that the pipeline returned -> in a layout of the family, where they are not.
    """

    name: str
    pipeline: Callable[..., Any]
    latents: tuple[int, ...]
    num_layers: int
    taps: tuple[int, ...]
    blocks: Callable[[Any], list[nn.Module]]
    pixels_per_side: int
    guided: tuple[float, Mapping[str, Any]] | None
    block_output: Callable[[Any, Setup], tuple[Tensor, Tensor]] = stream_pair
    arguments: Mapping[str, Any] = field(default_factory=dict)
    guidance_scale: float = 1.0
    classifier_free: bool = True
    size: tuple[int, int] = (64, 96)
    num_frames: int = 1
    result: Callable[[Any], Any] = pipeline_images
    given: Callable[[Setup, Tensor], Tensor] = packed
    returned: Callable[[Setup, Tensor], Tensor] = as_returned


@dataclass
class Setup:
    """A family with a tiny pipeline and inputs for one call."""

    row: Row
    family: ModelFamily
    pipeline: Any
    latents: Tensor
    timestep: Tensor
    conditioning: Conditioning

    @classmethod
    def of(cls, row: Row) -> Setup:
        pipeline, family = row.pipeline(), get_family(row.name)
        latents = torch.randn(row.latents, generator=torch.Generator().manual_seed(0))
        conditioning = family.encode_prompts(pipeline, PROMPTS, max_sequence_length=16)
        return cls(row, family, pipeline, latents, torch.tensor([250.0, 800.0]), conditioning)

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.family.denoiser_attribute)

    def backbone(self, denoiser: Any = None) -> Any:
        return self.family.build_backbone(
            self.denoiser if denoiser is None else denoiser,
            num_layers=self.row.num_layers,
            visual_taps=self.row.taps,
            text_taps=self.row.taps,
        )

    def predict(self, denoiser: Any = None, **arguments: Any) -> Tensor:
        """The policy-side prediction for the setup's inputs."""
        given = {"guidance_scale": self.row.guidance_scale, "conditioning": self.conditioning, **arguments}
        model = self.denoiser if denoiser is None else denoiser
        return self.family.predict_velocity(model, self.latents, self.timestep, **given)

    def reward_config(self) -> LatentRewardConfig:
        return LatentRewardConfig(
            family=self.row.name,
            num_layers=self.row.num_layers,
            visual_taps=self.row.taps,
            head=RewardHeadConfig(num_attention_heads=4),
            max_sequence_length=16,
        )

    def latent_shape(self) -> tuple[int, ...]:
        return self.family.latent_shape(
            self.pipeline, *self.row.size, self.denoiser.config, num_frames=self.row.num_frames
        )
