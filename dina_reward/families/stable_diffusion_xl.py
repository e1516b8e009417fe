"""Stable Diffusion XL: `UNet2DConditionModel` conditioned on image size, two CLIP text encoders, DDPM noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dina_reward.families.backbone import of_rows
from dina_reward.families.conditioning import Conditioning
from dina_reward.families.registry import register_family
from dina_reward.families.stable_diffusion import PLAIN_SETTINGS, UNetBackbone, UNetFamily


PIXELS_PER_LATENT = 8
"""Per side, of the autoencoder."""
TIME_IDS = 6
"""Numbers that tell the UNet the image's size: original height and width, crop top and left, target height and width."""


def size_ids(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """The six time ids of an image that was neither scaled nor cropped, in pixels, shape ``(1, 6)``."""
    height, width = (PIXELS_PER_LATENT * side for side in latents.shape[-2:])
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=dtype, device=latents.device)


class StableDiffusionXLBackbone(UNetBackbone):
    """`UNetBackbone` whose timestep embedding also carries the pooled prompt and the image size."""

    embedders = (*UNetBackbone.embedders, "add_time_proj", "add_embedding")

    def embed_time(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None
    ) -> Tensor:
        pooled: Any = conditioning.pooled_prompt_embeds
        size = self.add_time_proj(size_ids(latents, pooled.dtype).flatten()).reshape(1, -1)
        added = torch.cat([pooled, size.expand(pooled.shape[0], -1)], dim=-1)
        (embedded,) = of_rows(prompt_index, self.add_embedding(added.to(latents.dtype)))
        return super().embed_time(latents, timestep, conditioning, prompt_index) + embedded


@register_family
class StableDiffusionXLFamily(UNetFamily):
    """Stable Diffusion XL base, epsilon- or v-prediction.

    The UNet is told the size that the latents have (8 pixels per latent pixel), uncropped, as the pipeline does by default.
    The negative prompt is ``""``, encoded; the pipeline without a ``negative_prompt`` may use zeros instead
    (``force_zeros_for_empty_prompt``).
    """

    name = "stable_diffusion_xl"
    pipeline_classes = (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
    )
    backbone_class = StableDiffusionXLBackbone
    plain_settings: ClassVar[Mapping[str, Any]] = {**PLAIN_SETTINGS, "addition_embed_type": "text_time"}

    def matches(self, denoiser_config: Mapping[str, Any]) -> bool:
        return denoiser_config.get("addition_embed_type") == "text_time"

    def backbone_signature(self, denoiser_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        keys = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        added = {key: denoiser_config.get(key) for key in keys}
        return {**super().backbone_signature(denoiser_config, num_layers), **added}

    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        size = TIME_IDS * int(denoiser_config["addition_time_embed_dim"])
        width = int(denoiser_config["cross_attention_dim"])
        return width, int(denoiser_config["projection_class_embeddings_input_dim"]) - size

    def check_pipeline(self, pipeline: Any) -> None:
        if pipeline.text_encoder is None or pipeline.config.get("requires_aesthetics_score"):
            raise ValueError(
                "this pipeline is an SDXL refiner: it has one text encoder, or requires_aesthetics_score, and its UNet is "
                f"told an aesthetic score and not the target size; {self.name} supports SDXL base models with both encoders"
            )

    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        self.check_pipeline(pipeline)
        self.check_sequence_length(pipeline, options.get("max_sequence_length"))
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
            prompts,
            device=options["device"] or pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return Conditioning(prompt_embeds, pooled_prompt_embeds.to(prompt_embeds))

    def encode_images(self, pipeline: Any, images: Sequence[Image.Image]) -> Tensor:
        with _wide_enough(pipeline.vae):
            return super().encode_images(pipeline, images)

    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        with _wide_enough(pipeline.vae):
            return super().decode_latents(pipeline, latents)

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        text, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
        ids = size_ids(latents, text.dtype).expand(latents.shape[0], -1)
        return denoiser(
            latents.to(text.dtype),
            timestep,
            encoder_hidden_states=text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
            return_dict=False,
        )[0].float()


@contextmanager
def _wide_enough(vae: Any) -> Iterator[None]:
    """Runs an autoencoder that overflows in float16 in float32, as the pipeline does."""
    upcast = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)
