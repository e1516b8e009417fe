"""What a model family has to say about itself.

A family is everything the package knows about one kind of generator: how prompts become conditioning, how its latents
are laid out, which noise process it uses, how its denoiser is called (policy side) and tapped (reward side).

Inside the package latents are always in the *spatial layout*, ``(batch, channels, height, width)``, for videos
``(batch, channels, frames, height, width)``: it says which shape an image has. Families whose pipelines return packed
latents convert them at the door.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dina_reward.families.autoencoding import decode_kl, encode_kl
from dina_reward.families.backbone import Backbone
from dina_reward.families.conditioning import Conditioning, FeatureSizes
from dina_reward.families.layout import check_embeds, check_layout
from dina_reward.noise import FlowMatchingNoise, NoiseProcess


@dataclass(frozen=True)
class RewardDefaults:
    """Shape of a reward for a model of some size.

    Args:
        num_layers: blocks to run.
        taps: 1-based numbers of the blocks to read.
        head_width: width of the head; ``None`` takes the backbone's hidden size.
        lora_rank: rank of the LoRA; alpha is twice that.
        published: whether these values are from a published reward rather than this package's rule.
    """

    num_layers: int
    taps: tuple[int, ...]
    head_width: int | None = None
    lora_rank: int = 64
    published: bool = False

    @classmethod
    def first_half(cls, blocks: int, hidden: int) -> RewardDefaults:
        """The rule where nothing is published: half of the blocks, read after each third; a head of at most 1536."""
        depth = max(1, blocks // 2)
        taps = sorted({max(1, round(depth * third / 3)) for third in (1, 2, 3)})
        return cls(depth, tuple(taps), head_width=min(hidden, 1536))


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""LoRA targets: the projections of attention."""
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same where image and text tokens attend to each other with projections of their own."""


class ModelFamily(ABC):
    """Model-specific knowledge, as methods without state. What is not abstract has the default of most flow transformers.

    Class attributes:
        name: short name that is written into checkpoints.
        denoiser_classes: names of the diffusers denoiser classes of this family; the first one loads weights.
        pipeline_classes: names of the diffusers pipeline classes of this family.
        denoiser_attribute: name of the denoiser in a pipeline and of its sub-folder in a model repository.
        layer_keys: the denoiser settings that count the blocks of each of the backbone's lists.
        signature_keys: denoiser settings that the first blocks depend on; models that agree in them are interchangeable.
        backbone_class: the truncated view.
        reward_lora_targets: LoRA targets for the reward's backbone.
        policy_lora_targets: LoRA targets for fine-tuning the generator.
        reference_backbone_class: backbone class name that reference checkpoints record, if there are any.
        has_frames: whether latents have a frame dimension.
    """

    name: ClassVar[str]
    denoiser_classes: ClassVar[tuple[str, ...]]
    pipeline_classes: ClassVar[tuple[str, ...]]
    denoiser_attribute: ClassVar[str] = "transformer"
    layer_keys: ClassVar[tuple[str, ...]] = ("num_layers",)
    signature_keys: ClassVar[tuple[str, ...]]
    backbone_class: ClassVar[type[Backbone]]
    reward_lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    policy_lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    reference_backbone_class: ClassVar[str | None] = None
    has_frames: ClassVar[bool] = False

    # --- what a model is -----------------------------------------------------------------------------------------

    def matches(self, denoiser_config: Mapping[str, Any]) -> bool:
        """Whether a denoiser of one of `denoiser_classes` is of this family, where families share a class."""
        return True

    def num_blocks(self, denoiser_config: Mapping[str, Any]) -> int:
        """Blocks that a reward could run."""
        return sum(int(denoiser_config[key]) for key in self.layer_keys)

    def backbone_signature(self, denoiser_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        """Settings of a denoiser that its first ``num_layers`` blocks depend on; equal signatures are interchangeable."""
        return {key: denoiser_config.get(key) for key in self.signature_keys}

    def unread_layers(self, denoiser_config: Mapping[str, Any]) -> str | None:
        """Regular expression of the layers that a prediction does not depend on, by full name; they cannot be trained."""
        return None

    def feature_sizes(self, denoiser_config: Mapping[str, Any]) -> FeatureSizes:
        """Channel counts of the features, block by block where blocks differ."""
        width = int(denoiser_config["num_attention_heads"]) * int(denoiser_config["attention_head_dim"])
        return FeatureSizes(hidden=width, temb=width)

    def reward_defaults(self, denoiser_config: Mapping[str, Any]) -> RewardDefaults:
        """Shape of a reward on this model when nothing else is asked for."""
        hidden = self.feature_sizes(denoiser_config).hidden
        width = hidden if isinstance(hidden, int) else max(hidden)
        return RewardDefaults.first_half(self.num_blocks(denoiser_config), width)

    def check_pipeline(self, pipeline: Any) -> None:  # noqa: B027
        """Raises a `ValueError` when a policy cannot sample as this pipeline does."""

    # --- noise ---------------------------------------------------------------------------------------------------

    def noise_process(self, scheduler_config: Mapping[str, Any]) -> NoiseProcess:
        """The noise process of a training scheduler with this configuration."""
        return FlowMatchingNoise.from_scheduler_config(scheduler_config)

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, latent_shape: Sequence[int]) -> None:
        """Gives a fresh scheduler the grid that the family's pipeline would, on the CPU.

        Args:
            latent_shape: shape of one latent in the spatial layout; schedules that shift by image size depend on it.
        """
        scheduler.set_timesteps(num_inference_steps, device="cpu")

    # --- latents -------------------------------------------------------------------------------------------------

    def latent_channels(self, denoiser_config: Mapping[str, Any]) -> int:
        """Channels of a latent in the spatial layout."""
        return int(denoiser_config["in_channels"])

    def latent_multiple(self, denoiser_config: Mapping[str, Any]) -> int:
        """Each side of a latent has to be a multiple of this."""
        return int(denoiser_config.get("patch_size") or 1)

    def check_latents(self, latents: Tensor, denoiser_config: Mapping[str, Any]) -> None:
        """Raises a `ValueError` that names the fault when latents are not in the spatial layout of this family."""
        check_layout(
            latents,
            self.name,
            channels=self.latent_channels(denoiser_config),
            multiple=self.latent_multiple(denoiser_config),
            frames=self.has_frames,
        )

    def unpack_latents(
        self, latents: Tensor, denoiser_config: Mapping[str, Any], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Spatial layout of latents as the family's pipeline returns them; what is spatial already stays as it is.

        Args:
            height, width: size of the image in pixels, for packed latents that are not square.

        Raises:
            ValueError: packed latents that do not fit the size.
        """
        return latents

    def pack_latents(self, latents: Tensor) -> Tensor:
        """Inverse of `unpack_latents`: the layout of the family's pipeline."""
        return latents

    def latent_shape(
        self, pipeline: Any, height: int, width: int, denoiser_config: Mapping[str, Any], num_frames: int = 1
    ) -> tuple[int, ...]:
        """Spatial shape of one latent (without batch) for an image of ``height`` x ``width`` pixels."""
        if num_frames != 1:
            raise ValueError(f"{self.name} makes images, so num_frames must be 1, got {num_frames}")
        factor = int(pipeline.vae_scale_factor)
        step = factor * self.latent_multiple(denoiser_config)
        if height % step or width % step:
            raise ValueError(f"image size {height} x {width} must be divisible by {step}")
        return (self.latent_channels(denoiser_config), height // factor, width // factor)

    def encode_images(self, pipeline: Any, images: Sequence[Image.Image]) -> Tensor:
        """Scaled latents of images of one size, spatial layout, float32, by the pipeline's VAE."""
        denoiser = getattr(pipeline, self.denoiser_attribute)
        return encode_kl(pipeline, images, multiple=pipeline.vae_scale_factor * self.latent_multiple(denoiser.config))

    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        """Images in [0, 1], by the pipeline's VAE; never called in training unless a reward asks for pixels.

        Returns:
            `Tensor`: shape ``(batch, 3, height, width)``; of videos ``(batch, frames, 3, height, width)``.
        """
        return decode_kl(pipeline, latents)

    # --- prompts -------------------------------------------------------------------------------------------------

    @abstractmethod
    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        """Channels of the prompt embeddings and of the pooled ones, the latter ``None`` where the model takes none."""

    has_text_mask: ClassVar[bool] = False
    """Whether the model masks padding, so that conditionings carry a ``prompt_embeds_mask``."""

    def check_conditioning(self, conditioning: Conditioning, denoiser_config: Mapping[str, Any]) -> None:
        """Raises a `ValueError` when prompt embeddings have the wrong rank or width, or a required one is missing."""
        width, pooled_width = self.text_sizes(denoiser_config)
        check_embeds(conditioning, self.name, width=width, pooled_width=pooled_width, masked=self.has_text_mask)

    def embeds_length(self, pipeline: Any, max_sequence_length: int | None) -> int | None:
        """Tokens of every encoded prompt; ``None`` where they vary or are not known without encoding."""
        return None

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        max_sequence_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> Conditioning:
        """Encodes prompts with the pipeline's own text encoders, without gradient, no classifier-free guidance."""
        limit = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        return self.encode(pipeline, list(prompts), device=device, **limit)

    @abstractmethod
    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        """What `encode_prompts` does, by the pipeline's ``encode_prompt``.

        Args:
            options: as ``encode_prompt`` takes them: ``device`` (or ``None``), and ``max_sequence_length`` if it is not
                the pipeline's default.
        """

    def encode_negative(self, pipeline: Any, **options: Any) -> Conditioning:
        """One row: the empty prompt, as the pipeline encodes its negative prompt; options as for `encode_prompts`."""
        return self.encode_prompts(pipeline, [""], **options)

    # --- reward side ---------------------------------------------------------------------------------------------

    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> Backbone:
        """Truncated view that uses the given denoiser's own sub-modules (not copies); arguments as for `Backbone`.

        Raises:
            ValueError: the model has fewer blocks.
        """
        available = sum(len(getattr(denoiser, name)) for name in self.backbone_class.block_lists)
        if num_layers > available:
            raise ValueError(
                f"the reward reads {num_layers} blocks but this {type(denoiser).__name__} has {available}; "
                "it belongs to another model size"
            )
        return self.backbone_class(denoiser, num_layers=num_layers, visual_taps=visual_taps, text_taps=text_taps)

    def truncated_config(self, denoiser_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        """Settings with which the denoiser's class builds (at least) the first ``num_layers`` blocks alone."""
        settings = {}
        for key in self.layer_keys:
            settings[key] = min(num_layers, int(denoiser_config[key]))
            num_layers -= settings[key]
        return settings

    def load_denoiser(self, model_id: str, *, num_layers: int | None = None, **kwargs: Any) -> nn.Module:
        """Loads the denoiser of a diffusers model repository, only its first ``num_layers`` blocks where possible."""
        import diffusers

        model_class = getattr(diffusers, self.denoiser_classes[0])
        config = model_class.load_config(model_id, **config_options(kwargs))
        settings = {} if num_layers is None else self.truncated_config(config, num_layers)
        return model_class.from_pretrained(model_id, **settings, **kwargs)

    # --- policy side ---------------------------------------------------------------------------------------------

    @abstractmethod
    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """One call of the denoiser, spatial layout in and out, float32: what its pipeline gives to the scheduler.

        Args:
            guidance_scale: only for models that were distilled to take it as an input.
        """

    def uses_negative_prompt(self, denoiser_config: Mapping[str, Any], guidance_scale: float) -> bool:
        """Whether sampling at this scale runs classifier-free guidance, which takes a second, negative prediction."""
        return guidance_scale > 1

    def guide(self, negative: Tensor, positive: Tensor, guidance_scale: float) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598): ``negative + scale (positive - negative)``."""
        return negative + guidance_scale * (positive - negative)

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
        """Policy side: the model output (velocity for flow models, epsilon or v for DDPM models), with guidance if asked.

        Args:
            latents: spatial layout, shape ``(batch, ...)``.
            timestep: scheduler timesteps, shape ``(batch,)``.
            guidance_scale: classifier-free guidance runs above 1, and then needs ``negative_conditioning``; models that
                were distilled to take the scale as an input get it instead.

        Returns:
            `Tensor` of the shape of ``latents``, float32.

        Raises:
            ValueError: classifier-free guidance without ``negative_conditioning``.
        """
        if not self.uses_negative_prompt(config_of(denoiser), guidance_scale):
            return self.denoise(denoiser, latents, timestep, conditioning, guidance_scale)
        if negative_conditioning is None:
            raise ValueError(f"guidance_scale {guidance_scale} > 1 needs negative_conditioning")
        both = Conditioning.cat([negative_conditioning, conditioning])
        prediction = self.denoise(
            denoiser,
            torch.cat([latents, latents]),
            torch.cat([timestep, timestep]),
            both,
            guidance_scale,
        )
        negative, positive = prediction.chunk(2)
        return self.guide(negative, positive, guidance_scale)


def config_of(denoiser: Any) -> Mapping[str, Any]:
    """Configuration of a diffusers model inside the wrappers of distributed training."""
    while not hasattr(denoiser, "config"):
        denoiser = denoiser.module
    return denoiser.config


def config_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of `from_pretrained` that `load_config` takes too."""
    names = ("subfolder", "revision", "cache_dir", "token", "local_files_only")
    return {name: value for name, value in options.items() if name in names}
