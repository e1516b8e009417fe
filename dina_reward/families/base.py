"""What a model family has to say about itself, and the registry that finds it from a diffusers class.

A family is everything the package knows about one kind of generator: how prompts become conditioning, how its latents
are laid out, which noise process it uses, how its denoiser is called (policy side) and tapped (reward side).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dina_reward.noise import NoiseProcess


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts of a batch: every tensor has the prompt index as its first dimension.

    Args:
        prompt_embeds (`Tensor`): token embeddings, shape ``(batch, length, channels)``.
        pooled_prompt_embeds (`Tensor`, *optional*): pooled embeddings, shape ``(batch, pooled_channels)``.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None = None

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def map(self, function: Any) -> Conditioning:
        """Applies a tensor function to every tensor."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Conditioning(**{name: None if value is None else function(value) for name, value in values.items()})  # type: ignore[arg-type]

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """`Tensor.to` on every tensor."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def __getitem__(self, index: slice | Tensor | list[int]) -> Conditioning:
        """Rows of every tensor."""
        return self.map(lambda tensor: tensor[index])

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenates batches of equal token length."""
        values: dict[str, Tensor | None] = {}
        for f in fields(Conditioning):
            tensors = [getattr(part, f.name) for part in parts]
            values[f.name] = None if tensors[0] is None else torch.cat(tensors)
        return Conditioning(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TapFeatures:
    """Hidden states that a reward head reads.

    Args:
        visual (`list[Tensor]`): one tensor per visual tap, shape ``(rows, image_tokens, channels)``.
        text (`list[Tensor]`): one tensor per text tap, shape ``(rows, text_tokens, channels)``.
        temb (`Tensor`): the model's timestep (and pooled text) conditioning, shape ``(rows, channels)``.
    """

    visual: list[Tensor]
    text: list[Tensor]
    temb: Tensor


@dataclass(frozen=True)
class FeatureSizes:
    """Channel counts of `TapFeatures`.

    Args:
        hidden (`int` or `tuple[int, ...]`): of the image tokens: one number for all blocks, or one per block.
        temb (`int`): of ``temb``.
        text (`int`, *optional*): of the text tokens; default: ``hidden``.
    """

    hidden: int | tuple[int, ...]
    temb: int
    text: int | None = None

    def at(self, blocks: Sequence[int]) -> FeatureSizes:
        """Sizes of the features of these blocks alone (1-based numbers); ``hidden`` then has one entry per tap."""
        if isinstance(self.hidden, int):
            return self
        return replace(self, hidden=tuple(self.hidden[block - 1] for block in blocks))


class Backbone(nn.Module, ABC):
    """Truncated view of a denoiser: its own module tree, the first N blocks, features tapped after chosen blocks.

    Sub-modules keep the names they have in the diffusers model, so adapters trained on either side fit the other.
    """

    gradient_checkpointing: bool = False

    @abstractmethod
    def forward(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None = None
    ) -> TapFeatures:
        """Runs the blocks.

        Args:
            latents (`Tensor`): noisy latents in the family's layout, shape ``(rows, ...)``.
            timestep (`Tensor`): scheduler timesteps, shape ``(rows,)``, float32.
            conditioning (`Conditioning`): encoded *unique* prompts.
            prompt_index (`Tensor`, *optional*): for every row its prompt's position in ``conditioning``, shape
                ``(rows,)``, int64. Without it, row ``i`` uses prompt ``i``.
        """


class ModelFamily(ABC):
    """Model-specific knowledge, as methods without state.

    Class attributes:
        name: short name that is written into checkpoints.
        denoiser_classes: names of the diffusers denoiser classes of this family.
        pipeline_classes: names of the diffusers pipeline classes of this family.
        denoiser_attribute: name of the denoiser in a pipeline and of its sub-folder in a model repository.
        policy_lora_targets: LoRA targets for fine-tuning the generator.
        reward_lora_targets: LoRA targets for the reward's backbone.
        reference_backbone_class: backbone class name that reference checkpoints record.
    """

    name: ClassVar[str]
    denoiser_classes: ClassVar[tuple[str, ...]]
    pipeline_classes: ClassVar[tuple[str, ...]]
    denoiser_attribute: ClassVar[str] = "transformer"
    policy_lora_targets: ClassVar[tuple[str, ...]]
    reward_lora_targets: ClassVar[tuple[str, ...]]
    reference_backbone_class: ClassVar[str]

    @abstractmethod
    def backbone_signature(self, denoiser_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        """Settings of a denoiser that its first ``num_layers`` blocks depend on; equal signatures are interchangeable."""

    @abstractmethod
    def noise_process(self, scheduler_config: Mapping[str, Any]) -> NoiseProcess:
        """The noise process of a training scheduler with this configuration."""

    @abstractmethod
    def latent_channels(self, denoiser_config: Mapping[str, Any]) -> int:
        """Channels of a latent."""

    @abstractmethod
    def check_latents(self, latents: Tensor, denoiser_config: Mapping[str, Any]) -> None:
        """Raises a `ValueError` that names the fault when latents are not in the layout of this family."""

    @abstractmethod
    def latent_shape(
        self, pipeline: Any, height: int, width: int, denoiser_config: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """Shape of one latent (without batch) for an image of ``height`` x ``width`` pixels."""

    @abstractmethod
    def check_conditioning(self, conditioning: Conditioning, denoiser_config: Mapping[str, Any]) -> None:
        """Raises a `ValueError` when prompt embeddings have the wrong rank or width, or a required one is missing."""

    @abstractmethod
    def encode_prompts(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        max_sequence_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> Conditioning:
        """Encodes prompts with the pipeline's own text encoders, without gradient, no classifier-free guidance."""

    @abstractmethod
    def encode_images(self, pipeline: Any, images: Sequence[Image.Image]) -> Tensor:
        """Scaled latents of images of one size, float32, by the pipeline's VAE."""

    @abstractmethod
    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Images in [0, 1], shape ``(batch, 3, height, width)``, by the pipeline's VAE; never called in training."""

    @abstractmethod
    def feature_sizes(self, denoiser_config: Mapping[str, Any]) -> FeatureSizes:
        """Channel counts of the features, block by block where blocks differ."""

    @abstractmethod
    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> Backbone:
        """Truncated view that uses the given denoiser's own sub-modules (not copies).

        Args:
            denoiser: the diffusers model, or a clone of its module tree.
            num_layers: blocks to run.
            visual_taps, text_taps: 1-based numbers of the blocks after which image / text tokens are read.
        """

    @abstractmethod
    def load_denoiser(self, model_id: str, *, num_layers: int | None = None, **kwargs: Any) -> nn.Module:
        """Loads the denoiser of a diffusers model repository, only its first ``num_layers`` blocks where possible."""

    @abstractmethod
    def predict_velocity(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        *,
        negative_conditioning: Conditioning | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Policy side: the model output (velocity for flow models, epsilon or v for DDPM models), with CFG if asked.

        Classifier-free guidance runs when ``guidance_scale > 1``; it then needs ``negative_conditioning``.

        Args:
            latents: shape ``(batch, ...)``; timestep: scheduler timesteps, shape ``(batch,)``.

        Returns:
            `Tensor` of the shape of ``latents``, float32.
        """


def predict_with_guidance(
    predict: Callable[[Tensor, Tensor, Conditioning], Tensor],
    latents: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    negative_conditioning: Conditioning | None,
    guidance_scale: float,
) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598), ``negative + scale (positive - negative)``, in one call of ``predict``.

    At a scale of 1 or less, ``predict(latents, timestep, conditioning)`` alone.

    Raises:
        ValueError: a scale above 1 without ``negative_conditioning``.
    """
    if guidance_scale <= 1:
        return predict(latents, timestep, conditioning)
    if negative_conditioning is None:
        raise ValueError(f"guidance_scale {guidance_scale} > 1 needs negative_conditioning")
    both = Conditioning.cat([negative_conditioning, conditioning])
    negative, positive = predict(torch.cat([latents, latents]), torch.cat([timestep, timestep]), both).chunk(2)
    return negative + guidance_scale * (positive - negative)


_FAMILIES: dict[str, ModelFamily] = {}


def register_family(cls: type[ModelFamily]) -> type[ModelFamily]:
    """Class decorator that makes a family known under its name and its diffusers classes."""
    _FAMILIES[cls.name] = cls()
    return cls


def families() -> tuple[ModelFamily, ...]:
    """All registered families."""
    return tuple(_FAMILIES.values())


def get_family(name: str) -> ModelFamily:
    """Family by its name in a checkpoint.

    Raises:
        ValueError: no family of this name.
    """
    try:
        return _FAMILIES[name]
    except KeyError:
        raise ValueError(f"unknown model family {name!r}; this version supports: {', '.join(_FAMILIES)}") from None


def family_of(model: object) -> ModelFamily:
    """Family of a diffusers pipeline or denoiser, looked up by class name along its inheritance.

    Raises:
        ValueError: the class belongs to no supported family.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in families():
        if names & {*family.denoiser_classes, *family.pipeline_classes}:
            return family
    raise ValueError(
        f"{type(model).__name__} belongs to no supported model family; this version supports: "
        + "; ".join(f"{f.name} ({', '.join(f.pipeline_classes)})" for f in families())
    )
