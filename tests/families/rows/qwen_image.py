"""Qwen-Image: a text mask, packed latents of a video autoencoder, guidance that keeps the norm."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.row import Row
from tests.tiny_models import qwen_tokenizer


TEMPLATE = "<|im_start|>user\n{}<|im_end|>"


def tiny_qwen_image_pipeline(seed: int = 0, **overrides: Any) -> Any:
    """`QwenImagePipeline` with four blocks of width 32 and a prompt template that is short in bytes."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    config: dict[str, Any] = {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 4, 8),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        pipeline = QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(**{**config, **overrides}).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
            ),
            vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
            text_encoder=qwen_vl_text_encoder(tokenizer),
            tokenizer=tokenizer,
        )
    pipeline.prompt_template_encode = TEMPLATE
    pipeline.prompt_template_encode_start_idx = len(tokenizer(TEMPLATE.split("{}")[0]).input_ids)
    return pipeline


def qwen_vl_text_encoder(tokenizer: Any, hidden: int = 32) -> Any:
    """`Qwen2_5_VLForConditionalGeneration` with one block for text and one for images."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": hidden}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


ROW = Row(
    "qwen_image",
    tiny_qwen_image_pipeline,
    latents=(2, 16, 8, 12),
    num_layers=3,
    taps=(1, 2, 3),
    blocks=lambda backbone: list(backbone.transformer_blocks),
    pixels_per_side=16,
    arguments={"max_sequence_length": 16, "true_cfg_scale": 1.0},
    guided=(3.0, {"max_sequence_length": 16, "true_cfg_scale": 3.0, "negative_prompt": ""}),
)
