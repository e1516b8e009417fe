"""Qwen-Image: `QwenImageTransformer2DModel`, rectified flow shifted by image size, 2 x 2 packed latents, a text mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dina_reward.families.autoencoding import image_pixels
from dina_reward.families.backbone import Backbone, BlockInputs, of_rows
from dina_reward.families.base import JOINT_ATTENTION, config_of
from dina_reward.families.conditioning import Conditioning
from dina_reward.families.layout import pack_2x2, unpack_2x2
from dina_reward.families.packing import Packed2x2Family
from dina_reward.families.registry import register_family


PROMPT_TOKENS = 512
"""Length at which the pipeline cuts prompts, unless told otherwise."""

PLAIN_SETTINGS: Mapping[str, Any] = {
    "guidance_embeds": False,
    "zero_cond_t": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}
"""Settings of a model whose only inputs are latents, timestep and prompt, with the only values supported."""


def token_grid_of(latents: Tensor) -> tuple[int, int]:
    """Tokens per column and row of latents in the spatial layout."""
    return latents.shape[-2] // 2, latents.shape[-1] // 2


class QwenImageBackbone(Backbone):
    """First blocks of a `QwenImageTransformer2DModel`, called exactly as the full model calls them.

    The text stream's norm and input projection run once per unique prompt; rows pick their prompt afterwards.
    """

    embedders = ("pos_embed", "time_text_embed", "txt_norm", "img_in", "txt_in")
    block_lists = ("transformer_blocks",)

    def embed(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None
    ) -> BlockInputs:
        text = self.txt_in(self.txt_norm(conditioning.prompt_embeds))
        text, mask = of_rows(prompt_index, text, conditioning.prompt_embeds_mask)
        hidden = self.img_in(pack_2x2(latents))
        # The model takes timesteps divided by 1000 and multiplies them again.
        temb = self.time_text_embed(timestep / 1000, hidden)
        grid = token_grid_of(latents)
        arguments = {
            "encoder_hidden_states_mask": mask,
            "temb": temb,
            "image_rotary_emb": self.pos_embed([[(1, *grid)]], max_txt_seq_len=text.shape[1], device=latents.device),
        }
        return BlockInputs(hidden, text, temb, [arguments], text_mask=mask, grid=grid)


@register_family
class QwenImageFamily(Packed2x2Family):
    """Qwen-Image, text to image. ``guidance_scale`` is what its pipeline calls ``true_cfg_scale``."""

    name = "qwen_image"
    denoiser_classes = ("QwenImageTransformer2DModel",)
    pipeline_classes = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    signature_keys = (
        "patch_size",
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "axes_dims_rope",
    )
    backbone_class = QwenImageBackbone
    policy_lora_targets = JOINT_ATTENTION
    reward_lora_targets = policy_lora_targets
    has_text_mask = True

    def unread_layers(self, denoiser_config: Mapping[str, Any]) -> str | None:
        # The text that leaves the last block is dropped.
        last = int(denoiser_config["num_layers"]) - 1
        return rf"transformer_blocks\.{last}\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp\..*)"

    def check_supported(self, config: Mapping[str, Any]) -> None:
        """Raises a `ValueError` that lists the settings of a model which takes other inputs."""
        special = {key: config[key] for key, plain in PLAIN_SETTINGS.items() if config.get(key, plain) != plain}
        if special:
            raise ValueError(
                f"this transformer has settings {special}, as editing, layered or guidance-distilled models do; {self.name} "
                f"supports text-to-image models with {dict(PLAIN_SETTINGS)} alone"
            )

    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> Backbone:
        self.check_supported(denoiser.config)
        return super().build_backbone(denoiser, num_layers=num_layers, visual_taps=visual_taps, text_taps=text_taps)

    def unpack_latents(
        self, latents: Tensor, denoiser_config: Mapping[str, Any], height: int | None = None, width: int | None = None
    ) -> Tensor:
        if latents.ndim == 5 and latents.shape[2] == 1:  # with one frame, as the autoencoder takes them
            return latents[:, :, 0]
        return super().unpack_latents(latents, denoiser_config, height=height, width=width)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, images: Sequence[Image.Image]) -> Tensor:
        multiple = pipeline.vae_scale_factor * self.latent_multiple(pipeline.transformer.config)
        pixels = image_pixels(pipeline, images, multiple)
        latents = pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0].float()
        mean, std = _statistics(pipeline.vae, latents.device)
        return (latents - mean) / std

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        mean, std = _statistics(vae, latents.device)
        frames = (latents.float() * std + mean)[:, :, None].to(vae.device, vae.dtype)
        pixels = vae.decode(frames, return_dict=False)[0][:, :, 0]
        return pipeline.image_processor.postprocess(pixels.float(), output_type="pt")

    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(denoiser_config["joint_attention_dim"]), None

    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        prompt_embeds, mask = pipeline.encode_prompt(prompts, **{"max_sequence_length": PROMPT_TOKENS, **options})
        if mask is None:  # no prompt is shorter than the longest
            mask = prompt_embeds.new_ones(prompt_embeds.shape[:2])
        return Conditioning(prompt_embeds=prompt_embeds, prompt_embeds_mask=mask.bool())

    def guide(self, negative: Tensor, positive: Tensor, guidance_scale: float) -> Tensor:
        """Classifier-free guidance, then every token (2 x 2 latent pixels) gets the norm it has in ``positive``."""
        conditional = pack_2x2(positive)
        mixed = super().guide(pack_2x2(negative), conditional, guidance_scale)
        rescaled = mixed * (conditional.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
        return unpack_2x2(rescaled, token_grid_of(positive))

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        self.check_supported(config_of(denoiser))
        latents = latents.to(conditioning.prompt_embeds.dtype)
        grid = token_grid_of(latents)
        prediction = denoiser(
            hidden_states=pack_2x2(latents),
            timestep=timestep.to(latents.dtype) / 1000,
            encoder_hidden_states=conditioning.prompt_embeds,
            encoder_hidden_states_mask=conditioning.prompt_embeds_mask,
            img_shapes=[[(1, *grid)]] * latents.shape[0],
            return_dict=False,
        )[0]
        return unpack_2x2(prediction, grid).float()


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the autoencoder's latents, shapes ``(1, channels, 1, 1)``."""
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std], device=device)
    mean, std = values[:, None, :, None, None]
    return mean, std
