"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.families.row import Row, Setup
from tests.tiny_models import tiny_vae


def chat_tokenizer() -> Any:
    """Bytes as tokens, with a chat template of three tokens around the prompt."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
    return tokenizer


def tiny_z_image_pipeline(seed: int = 0, **overrides: Any) -> Any:
    """`ZImagePipeline` with three blocks of width 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    config: dict[str, Any] = {
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
        "axes_dims": [4, 4, 8],
        "axes_lens": [256, 32, 32],
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = chat_tokenizer()
        text = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
        )
        transformer = ZImageTransformer2DModel(**{**config, **overrides}).eval()
        torch.nn.init.normal_(transformer.x_pad_token)
        torch.nn.init.normal_(transformer.cap_pad_token)
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=Qwen3Model(text).eval(),
            tokenizer=tokenizer,
            transformer=transformer,
        )


def unified_sequence(output: Tensor, setup: Setup) -> tuple[Tensor, Tensor]:
    """Blocks return the image, padded to 32 tokens, and then the caption."""
    height, width = setup.latents.shape[-2:]
    image_tokens = height * width // 4
    start = -(-image_tokens // 32) * 32
    return output[:, start : start + setup.conditioning.prompt_embeds.shape[1]], output[:, :image_tokens]


ROW = Row(
    "z_image",
    tiny_z_image_pipeline,
    latents=(2, 16, 8, 12),
    num_layers=2,
    taps=(1, 2),
    blocks=lambda backbone: list(backbone.layers),
    block_output=unified_sequence,
    pixels_per_side=16,
    arguments={"max_sequence_length": 16, "guidance_scale": 0.0},
    guided=(3.0, {"max_sequence_length": 16, "guidance_scale": 2.0, "negative_prompt": ""}),
)
