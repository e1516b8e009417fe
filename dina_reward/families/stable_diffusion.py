"""Stable Diffusion 1.x and 2.x: `UNet2DConditionModel`, DDPM noise, epsilon- or v-prediction, 4-channel latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
from dina_reward.noise import VariancePreservingNoise


ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

LAYOUT_SETTINGS = (
    *("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "transformer_layers_per_block"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "only_cross_attention", "mid_block_type"),
    *("norm_num_groups", "use_linear_projection", "time_embedding_dim", "flip_sin_to_cos", "freq_shift"),
)
PLAIN_SETTINGS: Mapping[str, Any] = {
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "center_input_sample": False,
}
"""Settings of a UNet whose only inputs are latents, timestep and prompt embeddings."""


class UNetBackbone(Backbone):
    """Down blocks, then mid block of a `UNet2DConditionModel`, called exactly as the full model calls them.

    Blocks are numbered from 1: the down blocks ``1 .. D``, the mid block ``D + 1``. A visual tap is what its block
    returns (for a down block: after its downsampler), as ``height * width`` tokens. The head puts the taps of one place
    side by side, so taps of a finer grid are average-pooled to the grid of the last one. A UNet does not transform text:
    every text tap is the prompt embeddings as given, and one is enough.
    """

    def __init__(self, unet: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = unet.conv_in
        self.time_proj = unet.time_proj
        self.time_embedding = unet.time_embedding
        self.down_blocks = unet.down_blocks[:num_layers]
        self.mid_block = unet.mid_block if num_layers > len(unet.down_blocks) else None
        self.visual_taps = tuple(visual_taps)
        self.text_taps = tuple(text_taps)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the order of their numbers."""
        return [*self.down_blocks, *([] if self.mid_block is None else [self.mid_block])]

    def forward(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None = None
    ) -> TapFeatures:
        text = conditioning.prompt_embeds
        if prompt_index is not None:
            text = text[prompt_index]
        temb = self.time_embedding(self.time_proj(timestep).to(latents.dtype))
        hidden = self.conv_in(latents)
        maps = []
        for number, block in enumerate(self.blocks, start=1):
            hidden = self._run_block(block, hidden, temb, text)
            if number in self.visual_taps:
                maps.append(hidden)
        visual = [_tokens(tapped, *maps[-1].shape[-2:]) for tapped in maps]
        return TapFeatures(visual=visual, text=[text] * len(self.text_taps), temb=temb)

    def _run_block(self, block: nn.Module, hidden: Tensor, temb: Tensor, text: Tensor) -> Tensor:
        inputs = (hidden, temb, text) if getattr(block, "has_cross_attention", False) else (hidden, temb)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            output = checkpoint(block, *inputs, use_reentrant=False)
        else:
            output = block(*inputs)
        return output[0] if isinstance(output, tuple) else output


def _tokens(hidden: Tensor, height: int, width: int) -> Tensor:
    if hidden.shape[-2:] != (height, width):
        hidden = F.adaptive_avg_pool2d(hidden, (height, width))
    return hidden.flatten(2).transpose(1, 2)


@register_family
class StableDiffusionFamily(ModelFamily):
    """Stable Diffusion 1.x / 2.x. Stable Diffusion XL has another conditioning and is refused."""

    name = "stable_diffusion"
    denoiser_classes = ("UNet2DConditionModel",)
    pipeline_classes = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
    denoiser_attribute = "unet"
    policy_lora_targets = ATTENTION_TARGETS
    reward_lora_targets = ATTENTION_TARGETS
    reference_backbone_class = "UNetBackbone"

    def backbone_signature(self, denoiser_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        # Whole lists, also of the blocks that do not run: a model's last down block alone has no downsampler.
        return {key: denoiser_config.get(key) for key in (*LAYOUT_SETTINGS, *PLAIN_SETTINGS)}

    def noise_process(self, scheduler_config: Mapping[str, Any]) -> VariancePreservingNoise:
        return VariancePreservingNoise.from_scheduler_config(scheduler_config)

    def latent_channels(self, denoiser_config: Mapping[str, Any]) -> int:
        return int(denoiser_config["in_channels"])

    def check_latents(self, latents: Tensor, denoiser_config: Mapping[str, Any]) -> None:
        channels = self.latent_channels(denoiser_config)
        shape, expected = tuple(latents.shape), f"latents of shape (batch, {channels}, height, width)"
        layout = {3: "packed (FLUX layout) ", 5: "with a frame dimension (Qwen-Image or video layout) "}
        if latents.ndim != 4 or 0 in shape or shape[1] != channels:
            raise ValueError(f"latents {layout.get(latents.ndim, '')}have shape {shape}; {self.name} takes {expected}")

    def latent_shape(
        self, pipeline: Any, height: int, width: int, denoiser_config: Mapping[str, Any]
    ) -> tuple[int, ...]:
        factor = int(pipeline.vae_scale_factor)
        if height % factor or width % factor:
            raise ValueError(f"image size {height} x {width} must be divisible by {factor}")
        return (self.latent_channels(denoiser_config), height // factor, width // factor)

    def check_conditioning(self, conditioning: Conditioning, denoiser_config: Mapping[str, Any]) -> None:
        width, embeds = int(denoiser_config["cross_attention_dim"]), conditioning.prompt_embeds
        if embeds.ndim != 3 or embeds.shape[-1] != width:
            raise ValueError(
                f"prompt_embeds have shape {tuple(embeds.shape)}; {self.name} takes (batch, length, {width})"
            )
        if conditioning.pooled_prompt_embeds is not None:
            raise ValueError(f"{self.name} takes no pooled_prompt_embeds; give prompt_embeds alone")

    @torch.no_grad()
    def encode_prompts(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        *,
        max_sequence_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> Conditioning:
        length = pipeline.tokenizer.model_max_length
        if max_sequence_length not in (None, length):
            raise ValueError(
                f"max_sequence_length is {max_sequence_length}, but a {type(pipeline).__name__} pads every prompt to its "
                f"tokenizer's {length} tokens; give {length} or None"
            )
        prompt_embeds, _ = pipeline.encode_prompt(
            list(prompts),
            device=pipeline.text_encoder.device if device is None else device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return Conditioning(prompt_embeds=prompt_embeds)

    def encode_images(self, pipeline: Any, images: Sequence[Image.Image]) -> Tensor:
        return encode_kl(pipeline, images, multiple=pipeline.vae_scale_factor)

    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        return decode_kl(pipeline, latents)

    def feature_sizes(self, denoiser_config: Mapping[str, Any]) -> FeatureSizes:
        widths = [int(width) for width in denoiser_config["block_out_channels"]]
        return FeatureSizes(
            hidden=(*widths, widths[-1]),
            temb=int(denoiser_config.get("time_embedding_dim") or 4 * widths[0]),
            text=int(denoiser_config["cross_attention_dim"]),
        )

    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> UNetBackbone:
        _check_supported(denoiser.config)
        available = len(denoiser.down_blocks) + (denoiser.mid_block is not None)
        if num_layers > available:
            raise ValueError(
                f"the reward reads {num_layers} blocks but this {type(denoiser).__name__} has {available} "
                "(down blocks, then the mid block); it belongs to another model size"
            )
        return UNetBackbone(denoiser, num_layers=num_layers, visual_taps=visual_taps, text_taps=text_taps)

    def load_denoiser(self, model_id: str, *, num_layers: int | None = None, **kwargs: Any) -> nn.Module:
        from diffusers import UNet2DConditionModel

        unet: Any = UNet2DConditionModel.from_pretrained(model_id, **kwargs)
        if num_layers is None:
            return unet
        # A UNet with fewer blocks has another block layout, so the whole model is read and the rest let go.
        if num_layers <= len(unet.down_blocks):
            unet.mid_block = None
        unet.down_blocks = unet.down_blocks[:num_layers]
        unet.up_blocks = nn.ModuleList()
        unet.conv_norm_out = unet.conv_out = None
        return unet

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
            text = conditioning.prompt_embeds
            return denoiser(latents.to(text.dtype), timestep, encoder_hidden_states=text, return_dict=False)[0].float()

        return predict_with_guidance(predict, latents, timestep, conditioning, negative_conditioning, guidance_scale)


def _check_supported(config: Mapping[str, Any]) -> None:
    special = {key: config[key] for key, plain in PLAIN_SETTINGS.items() if config.get(key, plain) != plain}
    if config["in_channels"] != config["out_channels"]:
        special["in_channels"], special["out_channels"] = config["in_channels"], config["out_channels"]
    if not isinstance(config["cross_attention_dim"], int):
        special["cross_attention_dim"] = config["cross_attention_dim"]
    if special:
        raise ValueError(
            f"this UNet has settings {special} beyond latents, timestep and prompt embeddings, as Stable Diffusion XL and "
            "inpainting, upscaling or guidance-distilled models do; this version supports text-to-image UNets of Stable "
            "Diffusion 1.x and 2.x"
        )
