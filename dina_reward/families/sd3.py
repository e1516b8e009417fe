"""Stable Diffusion 3 and 3.5 (Medium, Large): `SD3Transformer2DModel`, rectified flow, 16-channel unpacked latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dina_reward.families.autoencoding import decode_kl, encode_kl
from dina_reward.families.base import (
    Backbone,
    Conditioning,
    FeatureSizes,
    ModelFamily,
    TapFeatures,
    predict_with_guidance,
    register_family,
)
from dina_reward.noise import FlowMatchingNoise


class SD3Backbone(Backbone):
    """First blocks of an `SD3Transformer2DModel`, called exactly as the full model calls them.

    The text stream's input projection runs once per unique prompt; rows pick their prompt afterwards.
    """

    def __init__(
        self, transformer: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> None:
        super().__init__()
        self.pos_embed = transformer.pos_embed
        self.time_text_embed = transformer.time_text_embed
        self.context_embedder = transformer.context_embedder
        self.transformer_blocks = transformer.transformer_blocks[:num_layers]
        self.visual_taps = tuple(visual_taps)
        self.text_taps = tuple(text_taps)

    def forward(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None = None
    ) -> TapFeatures:
        text = self.context_embedder(conditioning.prompt_embeds)
        pooled = conditioning.pooled_prompt_embeds
        if prompt_index is not None:
            text, pooled = text[prompt_index], pooled[prompt_index]  # type: ignore[index]
        temb = self.time_text_embed(timestep, pooled)
        hidden = self.pos_embed(latents).contiguous()
        visual_features, text_features = [], []
        for number, block in enumerate(self.transformer_blocks, start=1):
            text, hidden = self._run_block(block, hidden, text, temb)
            if number in self.visual_taps:
                visual_features.append(hidden)
            if number in self.text_taps:
                text_features.append(text)
        return TapFeatures(visual=visual_features, text=text_features, temb=temb)

    def _run_block(self, block: nn.Module, hidden: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, hidden, text, temb, use_reentrant=False)
        return block(hidden_states=hidden, encoder_hidden_states=text, temb=temb)


@register_family
class SD3Family(ModelFamily):
    """Stable Diffusion 3 / 3.5."""

    name = "sd3"
    denoiser_classes = ("SD3Transformer2DModel",)
    pipeline_classes = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    policy_lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    reward_lora_targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )
    reference_backbone_class = "SD3Backbone"

    def backbone_signature(self, denoiser_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        keys = (
            "patch_size",
            "in_channels",
            "num_attention_heads",
            "attention_head_dim",
            "joint_attention_dim",
            "pooled_projection_dim",
            "caption_projection_dim",
            "pos_embed_max_size",
            "qk_norm",
        )
        dual = [i for i in denoiser_config.get("dual_attention_layers") or () if i < num_layers]
        return {**{key: denoiser_config.get(key) for key in keys}, "dual_attention_layers": dual}

    def noise_process(self, scheduler_config: Mapping[str, Any]) -> FlowMatchingNoise:
        return FlowMatchingNoise.from_scheduler_config(scheduler_config)

    def latent_channels(self, denoiser_config: Mapping[str, Any]) -> int:
        return int(denoiser_config["in_channels"])

    def check_latents(self, latents: Tensor, denoiser_config: Mapping[str, Any]) -> None:
        channels, patch = self.latent_channels(denoiser_config), int(denoiser_config["patch_size"])
        expected = f"unpacked latents of shape (batch, {channels}, height, width)"
        if latents.ndim == 3 and latents.shape[-1] in (channels * patch * patch, 64):
            raise ValueError(
                f"got packed latents of shape {tuple(latents.shape)} (FLUX layout); {self.name} takes {expected}"
            )
        if latents.ndim != 4:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; {self.name} takes {expected}")
        if latents.shape[1] != channels:
            raise ValueError(
                f"latents have {latents.shape[1]} channels (shape {tuple(latents.shape)}); {self.name} takes {expected}"
            )
        limit = int(denoiser_config["pos_embed_max_size"]) * patch
        height, width = latents.shape[-2:]
        if height % patch or width % patch or max(height, width) > limit or min(height, width) == 0:
            raise ValueError(
                f"latents are {height} x {width}; each side must be a multiple of {patch} and at most {limit} "
                "for this model's position table"
            )

    def latent_shape(
        self, pipeline: Any, height: int, width: int, denoiser_config: Mapping[str, Any]
    ) -> tuple[int, ...]:
        factor = int(pipeline.vae_scale_factor)
        step = factor * int(denoiser_config["patch_size"])
        if height % step or width % step:
            raise ValueError(f"image size {height} x {width} must be divisible by {step}")
        return (self.latent_channels(denoiser_config), height // factor, width // factor)

    def check_conditioning(self, conditioning: Conditioning, denoiser_config: Mapping[str, Any]) -> None:
        width, pooled_width = (
            int(denoiser_config["joint_attention_dim"]),
            int(denoiser_config["pooled_projection_dim"]),
        )
        embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_prompt_embeds
        if embeds.ndim != 3 or embeds.shape[-1] != width:
            raise ValueError(
                f"prompt_embeds have shape {tuple(embeds.shape)}; {self.name} takes (batch, length, {width})"
            )
        if pooled is None:
            raise ValueError(f"{self.name} needs pooled_prompt_embeds of shape (batch, {pooled_width}) as well")
        if pooled.shape != (embeds.shape[0], pooled_width):
            raise ValueError(
                f"pooled_prompt_embeds have shape {tuple(pooled.shape)}; expected {(embeds.shape[0], pooled_width)}"
            )

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        max_sequence_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> Conditioning:
        limit = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            device=device,
            **limit,
        )
        return Conditioning(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds)

    def encode_images(self, pipeline: Any, images: Sequence[Image.Image]) -> Tensor:
        return encode_kl(pipeline, images, multiple=pipeline.vae_scale_factor * pipeline.patch_size)

    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        return decode_kl(pipeline, latents)

    def feature_sizes(self, denoiser_config: Mapping[str, Any]) -> FeatureSizes:
        width = int(denoiser_config["num_attention_heads"]) * int(denoiser_config["attention_head_dim"])
        return FeatureSizes(hidden=width, temb=width)

    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> SD3Backbone:
        available = len(denoiser.transformer_blocks)
        if num_layers > available:
            raise ValueError(
                f"the reward reads {num_layers} blocks but this {type(denoiser).__name__} has {available}; "
                "it belongs to another model size"
            )
        if num_layers in text_taps and denoiser.transformer_blocks[num_layers - 1].context_pre_only:
            raise ValueError(
                f"block {num_layers} is the model's last and returns no text tokens; "
                f"tap text at earlier blocks than {tuple(text_taps)}"
            )
        return SD3Backbone(denoiser, num_layers=num_layers, visual_taps=visual_taps, text_taps=text_taps)

    def load_denoiser(self, model_id: str, *, num_layers: int | None = None, **kwargs: Any) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        config = SD3Transformer2DModel.load_config(model_id, **_config_kwargs(kwargs))
        if num_layers is None or num_layers >= config["num_layers"]:
            return SD3Transformer2DModel.from_pretrained(model_id, **kwargs)
        # The class always builds its last block without a text output, so one more block than needed is asked for
        # and dropped; its mismatched weights never matter.
        transformer = SD3Transformer2DModel.from_pretrained(
            model_id, num_layers=num_layers + 1, ignore_mismatched_sizes=True, low_cpu_mem_usage=False, **kwargs
        )
        transformer.transformer_blocks = transformer.transformer_blocks[:num_layers]
        return transformer

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
        def predict(latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
            return denoiser(
                hidden_states=latents.to(conditioning.prompt_embeds.dtype),
                timestep=timestep,
                encoder_hidden_states=conditioning.prompt_embeds,
                pooled_projections=conditioning.pooled_prompt_embeds,
                return_dict=False,
            )[0].float()

        return predict_with_guidance(predict, latents, timestep, conditioning, negative_conditioning, guidance_scale)


def _config_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in kwargs.items() if k in ("subfolder", "revision", "cache_dir", "token", "local_files_only")
    }
