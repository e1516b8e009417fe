"""FLUX.1 dev and schnell: `FluxTransformer2DModel`, rectified flow shifted by image size, 2 x 2 packed latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward.families.backbone import Backbone, BlockInputs, of_rows
from dina_reward.families.base import JOINT_ATTENTION, RewardDefaults, config_of
from dina_reward.families.conditioning import Conditioning
from dina_reward.families.layout import pack_2x2, unpack_2x2
from dina_reward.families.packing import Packed2x2Family
from dina_reward.families.registry import register_family


REWARD_GUIDANCE = 3.5
"""What the reward's backbone is told where the model takes a guidance scale as an input."""


def position_ids(latents: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Ids of text tokens (zeros) and image tokens (0, row, column), shapes ``(tokens, 3)``."""
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    image = torch.zeros(rows, columns, 3, device=latents.device)
    image[..., 1] = torch.arange(rows, device=latents.device)[:, None]
    image[..., 2] = torch.arange(columns, device=latents.device)
    return torch.zeros(text_tokens, 3, device=latents.device), image.flatten(0, 1)


class FluxBackbone(Backbone):
    """First blocks of a `FluxTransformer2DModel`: the double-stream ones, then the single-stream ones."""

    embedders = ("pos_embed", "time_text_embed", "context_embedder", "x_embedder")
    block_lists = ("transformer_blocks", "single_transformer_blocks")

    def __init__(self, denoiser: Any, **taps: Any) -> None:
        super().__init__(denoiser, **taps)
        self.guidance_embeds = bool(denoiser.config["guidance_embeds"])

    def embed(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None
    ) -> BlockInputs:
        text = self.context_embedder(conditioning.prompt_embeds)
        text, pooled = of_rows(prompt_index, text, conditioning.pooled_prompt_embeds)
        # The model takes timesteps and guidance divided by 1000 and multiplies them again.
        guidance = (timestep.new_full(timestep.shape, 1000 * REWARD_GUIDANCE),) if self.guidance_embeds else ()
        temb = self.time_text_embed(timestep, *guidance, pooled)
        rotary = self.pos_embed(torch.cat(position_ids(latents, text.shape[1])))
        arguments = {"temb": temb, "image_rotary_emb": rotary}
        grid = (latents.shape[-2] // 2, latents.shape[-1] // 2)
        return BlockInputs(self.x_embedder(pack_2x2(latents)), text, temb, [arguments, arguments], grid=grid)


@register_family
class FluxFamily(Packed2x2Family):
    """FLUX.1. Of dev, ``guidance_scale`` is an input of the model; of schnell, it is that of classifier-free guidance."""

    name = "flux"
    denoiser_classes = ("FluxTransformer2DModel",)
    pipeline_classes = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    layer_keys = ("num_layers", "num_single_layers")
    signature_keys = (
        "patch_size",
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
        "guidance_embeds",
        "axes_dims_rope",
    )
    backbone_class = FluxBackbone
    policy_lora_targets = tuple(f"attn.{name}" for name in JOINT_ATTENTION)
    reward_lora_targets = policy_lora_targets
    reference_backbone_class = "FluxBackbone"

    def reward_defaults(self, denoiser_config: Mapping[str, Any]) -> RewardDefaults:
        if denoiser_config["num_layers"] == 19:
            return RewardDefaults(19, (8, 12, 16, 19), head_width=1536, published=True)
        return super().reward_defaults(denoiser_config)

    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(denoiser_config["joint_attention_dim"]), int(denoiser_config["pooled_projection_dim"])

    def embeds_length(self, pipeline: Any, max_sequence_length: int | None) -> int | None:
        return max_sequence_length or 512

    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(prompt=prompts, prompt_2=None, **options)
        return Conditioning(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds)

    def uses_negative_prompt(self, denoiser_config: Mapping[str, Any], guidance_scale: float) -> bool:
        return guidance_scale > 1 and not denoiser_config["guidance_embeds"]

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        latents = latents.to(conditioning.prompt_embeds.dtype)
        text_ids, image_ids = position_ids(latents, conditioning.prompt_embeds.shape[1])
        guided = config_of(denoiser)["guidance_embeds"]
        prediction = denoiser(
            hidden_states=pack_2x2(latents),
            timestep=timestep.to(latents.dtype) / 1000,
            guidance=timestep.new_full(timestep.shape, guidance_scale, dtype=torch.float32) if guided else None,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled_prompt_embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return unpack_2x2(prediction, (latents.shape[-2] // 2, latents.shape[-1] // 2)).float()
