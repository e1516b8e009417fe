"""Wan text-to-video, videos of five frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.families.row import Row, Setup
from tests.tiny_models import t5_tokenizer


def tiny_wan_pipeline(seed: int = 0, **overrides: Any) -> Any:
    """`WanPipeline` with three blocks of width 32."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer()
        encoder = UMT5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(encoder).eval(),
            vae=AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
            transformer=WanTransformer3DModel(**{**config, **overrides}).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def projected_text(output: Tensor, setup: Setup) -> tuple[Tensor, Tensor]:
    """Blocks return the image tokens alone; what they attend to is the same for all."""
    return setup.denoiser.condition_embedder.text_embedder(setup.conditioning.prompt_embeds), output


ROW = Row(
    "wan",
    tiny_wan_pipeline,
    latents=(2, 16, 2, 8, 12),
    num_layers=2,
    taps=(1, 2),
    blocks=lambda backbone: list(backbone.blocks),
    block_output=projected_text,
    pixels_per_side=16,
    arguments={"num_frames": 5, "max_sequence_length": 16, "guidance_scale": 1.0},
    guided=(3.0, {"num_frames": 5, "max_sequence_length": 16, "guidance_scale": 3.0, "negative_prompt": ""}),
    num_frames=5,
    result=lambda output: output.frames,
)
