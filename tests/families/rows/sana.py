"""Sana, with timesteps scaled and a sine position table, as in some published sizes."""

from __future__ import annotations

import string
from typing import Any

import torch

from tests.families.row import Row, Setup


def gemma_tokenizer() -> Any:
    """Character tokenizer that begins every text with ``<bos>``, as the published one does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n", *string.printable[:94]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[])
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def tiny_dc_autoencoder() -> Any:
    """`AutoencoderDC` that compresses each side by 32."""
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8, 8, 32, 32),
        decoder_block_out_channels=(8, 8, 8, 8, 32, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    ).eval()


def tiny_sana_pipeline(seed: int = 0, scheduler: Any = None, **overrides: Any) -> Any:
    """`SanaPipeline` with three blocks of width 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    config: dict[str, Any] = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_layers": 3,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "sample_size": 32,
        "interpolation_scale": 1.0,
        "qk_norm": "rms_norm_across_heads",
        "timestep_scale": 0.5,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = gemma_tokenizer()
        encoder = Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            query_pre_attn_scalar=12,
        )
        return SanaPipeline(
            transformer=SanaTransformer2DModel(**{**config, **overrides}).eval(),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_dc_autoencoder(),
            text_encoder=Gemma2Model(encoder).eval(),
            tokenizer=tokenizer,
        )


def projected_text(output: Any, setup: Setup) -> tuple[Any, Any]:
    """The blocks return image tokens alone; the text is what the full model projects for them."""
    model = setup.denoiser
    return model.caption_norm(model.caption_projection(setup.conditioning.prompt_embeds)), output


ARGUMENTS = {"max_sequence_length": 16, "use_resolution_binning": False}

ROW = Row(
    "sana",
    tiny_sana_pipeline,
    latents=(2, 32, 4, 6),
    num_layers=2,
    taps=(1, 2),
    blocks=lambda backbone: list(backbone.transformer_blocks),
    block_output=projected_text,
    pixels_per_side=32,
    arguments={**ARGUMENTS, "guidance_scale": 1.0},
    guided=(3.0, {**ARGUMENTS, "guidance_scale": 3.0}),
)
