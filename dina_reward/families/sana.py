"""Sana 1.0 and 1.5: `SanaTransformer2DModel`, rectified flow, 32-channel latents of a 32-fold autoencoder, Gemma text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward.families.backbone import Backbone, BlockInputs, of_rows
from dina_reward.families.base import ModelFamily, config_of
from dina_reward.families.conditioning import Conditioning
from dina_reward.families.registry import register_family


MASKED = -10000.0
"""What the model adds to the attention logits of padding."""


class SanaBackbone(Backbone):
    """First blocks of a `SanaTransformer2DModel`, called exactly as the full model calls them.

    The blocks read text by cross attention and do not transform it: every text tap is the projected prompt, and one is
    enough. The projection runs once per unique prompt; rows pick their prompt afterwards.
    """

    embedders = ("patch_embed", "time_embed", "caption_projection", "caption_norm")
    block_lists = ("transformer_blocks",)

    def __init__(self, denoiser: Any, **taps: Any) -> None:
        super().__init__(denoiser, **taps)
        self.patch_size = int(denoiser.config["patch_size"])
        self.timestep_scale = float(denoiser.config["timestep_scale"])

    def embed(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None
    ) -> BlockInputs:
        text = self.caption_norm(self.caption_projection(conditioning.prompt_embeds))
        text, mask = of_rows(prompt_index, text, conditioning.token_mask)
        rows, columns = (side // self.patch_size for side in latents.shape[-2:])
        hidden = self.patch_embed(latents)
        modulation, temb = self.time_embed(
            timestep * self.timestep_scale, batch_size=latents.shape[0], hidden_dtype=hidden.dtype
        )
        arguments = {
            "attention_mask": None,
            "encoder_attention_mask": ((1 - mask.to(latents.dtype)) * MASKED)[:, None],
            "timestep": modulation,
            "height": rows,
            "width": columns,
        }
        return BlockInputs(hidden, text, temb, [arguments], text_mask=mask, grid=(rows, columns))


@register_family
class SanaFamily(ModelFamily):
    """Sana 1.0 and 1.5, and their fine-tunes.

    Latents have one pixel per 32 x 32 image pixels. Prompts get the instruction that the pipeline puts before them by
    default (``complex_human_instruction``), the negative prompt gets none. The pipeline's own call also rounds the image
    size to one of its aspect ratios (``use_resolution_binning``); this package samples at exactly the size it is given.
    """

    name = "sana"
    denoiser_classes = ("SanaTransformer2DModel",)
    pipeline_classes = ("SanaPipeline",)
    signature_keys = (
        "patch_size",
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "num_cross_attention_heads",
        "cross_attention_head_dim",
        "cross_attention_dim",
        "caption_channels",
        "mlp_ratio",
        "attention_bias",
        "norm_elementwise_affine",
        "norm_eps",
        "sample_size",
        "interpolation_scale",
        "guidance_embeds",
        "qk_norm",
        "timestep_scale",
    )
    backbone_class = SanaBackbone
    has_text_mask = True

    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(denoiser_config["caption_channels"]), None

    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        return self._encode(pipeline, prompts, instruction, options)

    def encode_negative(self, pipeline: Any, **options: Any) -> Conditioning:
        with torch.no_grad():
            return self._encode(pipeline, [""], None, {k: v for k, v in options.items() if v is not None})

    def _encode(
        self, pipeline: Any, prompts: list[str], instruction: list[str] | None, options: Mapping[str, Any]
    ) -> Conditioning:
        prompt_embeds, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, complex_human_instruction=instruction, **options
        )
        return Conditioning(prompt_embeds, prompt_embeds_mask=mask.bool())

    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> Backbone:
        _check_undistilled(denoiser.config)
        return super().build_backbone(denoiser, num_layers=num_layers, visual_taps=visual_taps, text_taps=text_taps)

    def check_pipeline(self, pipeline: Any) -> None:
        _check_undistilled(pipeline.transformer.config)

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        text = conditioning.prompt_embeds
        prediction = denoiser(
            latents.to(text.dtype),
            encoder_hidden_states=text,
            encoder_attention_mask=conditioning.token_mask,
            timestep=timestep * config_of(denoiser)["timestep_scale"],
            return_dict=False,
        )[0]
        # Models with a learned variance return it behind the velocity.
        return prediction[:, : latents.shape[1]].float()


def _check_undistilled(config: Mapping[str, Any]) -> None:
    if config["guidance_embeds"]:
        raise ValueError(
            "this SanaTransformer2DModel has guidance_embeds=True: Sana-Sprint was distilled to few steps of another noise "
            "process; the sana family supports Sana 1.0 and 1.5, which have guidance_embeds=False"
        )
