"""FLUX.1, guidance-distilled as dev is."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.row import Row
from tests.tiny_models import clip_text_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, tiny_vae


def tiny_flux_pipeline(seed: int = 0, **overrides: Any) -> Any:
    """`FluxPipeline` with two double-stream and two single-stream blocks of width 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
        return FluxPipeline(
            transformer=FluxTransformer2DModel(**{**config, **overrides}).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=clip_text_encoder(tokenizer, projection=False),
            tokenizer=tokenizer,
            text_encoder_2=t5_encoder(tokenizer_2, width=32),
            tokenizer_2=tokenizer_2,
        )


ROW = Row(
    "flux",
    tiny_flux_pipeline,
    latents=(2, 16, 8, 12),
    num_layers=3,
    taps=(1, 2, 3),
    blocks=lambda backbone: [*backbone.transformer_blocks, *backbone.single_transformer_blocks],
    pixels_per_side=16,
    arguments={"max_sequence_length": 16, "guidance_scale": 3.5},
    guidance_scale=3.5,
    guided=(2.0, {"max_sequence_length": 16, "guidance_scale": 2.0}),
    classifier_free=False,
)
