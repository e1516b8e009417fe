"""Stable Diffusion XL base."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.row import Row
from tests.families.rows.stable_diffusion import unet_output
from tests.tiny_models import clip_text_encoder, clip_tokenizer, tiny_unet, tiny_vae


def tiny_sdxl_pipeline(
    seed: int = 0, prediction_type: str = "epsilon", vae: dict[str, Any] | None = None, **overrides: Any
) -> Any:
    """`StableDiffusionXLPipeline` with character tokenizers of 16 tokens; latents with a mean and a spread per channel.

    Args:
        vae: settings of the autoencoder to change.
    """
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    config: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 48,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    }
    statistics = {"latents_mean": (0.4, -0.3, 0.2, 0.1), "latents_std": (1.5, 0.7, 2.0, 1.1)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(model_max_length=16)
        autoencoder = tiny_vae(4, scaling_factor=0.13025, shift_factor=None)
        autoencoder.register_to_config(**{**statistics, **(vae or {})})
        return StableDiffusionXLPipeline(
            unet=tiny_unet(**{**config, **overrides}),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction_type,
            ),
            vae=autoencoder,
            text_encoder=clip_text_encoder(tokenizer, hidden=16, projection=False),
            tokenizer=tokenizer,
            text_encoder_2=clip_text_encoder(tokenizer, hidden=32),
            tokenizer_2=tokenizer,
            add_watermarker=False,
        )


ROW = Row(
    "stable_diffusion_xl",
    tiny_sdxl_pipeline,
    latents=(2, 4, 8, 12),
    num_layers=3,
    taps=(2, 3),
    blocks=lambda backbone: [*backbone.down_blocks, backbone.mid_block],
    block_output=unet_output,
    pixels_per_side=8,
    arguments={"guidance_scale": 1.0},
    guided=(3.0, {"guidance_scale": 3.0, "negative_prompt": ""}),
)
