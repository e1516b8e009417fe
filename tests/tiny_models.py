"""Tiny random diffusers pipelines, built in memory."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import Any

import torch


def clip_tokenizer(model_max_length: int = 77) -> Any:
    import transformers

    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if transformers.__version__ >= "5":
        return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)
    with tempfile.TemporaryDirectory() as directory:
        files = {"vocab_file": Path(directory, "vocab.json"), "merges_file": Path(directory, "merges.txt")}
        files["vocab_file"].write_text(json.dumps(vocab))
        files["merges_file"].write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer(**files, model_max_length=model_max_length)


def t5_tokenizer(model_max_length: int = 77) -> Any:
    import transformers

    letters = string.ascii_letters + string.digits + string.punctuation
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    if transformers.__version__ >= "5":
        return transformers.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=model_max_length)
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=model_max_length)


def qwen_tokenizer(model_max_length: int = 77) -> Any:
    """One token per byte, and a chat template without system message."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def clip_text_encoder(tokenizer: Any, hidden: int = 32, projection: bool = True) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=hidden,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_encoder(tokenizer: Any, width: int = 64) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=width,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5EncoderModel(config).eval()


def tiny_vae(latent_channels: int = 16, scaling_factor: float = 1.5305, shift_factor: float | None = 0.0609) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=latent_channels,
        sample_size=128,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def tiny_sd3_transformer(**overrides: Any) -> Any:
    """3 blocks of width 32 with one dual-attention block, as in SD3.5."""
    from diffusers import SD3Transformer2DModel

    config: dict[str, Any] = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 32,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    return SD3Transformer2DModel(**{**config, **overrides}).eval()


def tiny_sd3_pipeline(seed: int = 0, **overrides: Any) -> Any:
    """`StableDiffusion3Pipeline` with character tokenizers and random weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
        return StableDiffusion3Pipeline(
            transformer=tiny_sd3_transformer(**overrides),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(),
            text_encoder=clip_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=clip_text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=t5_encoder(tokenizer_3),
            tokenizer_3=tokenizer_3,
            image_encoder=None,
            feature_extractor=None,
        )


def tiny_unet(**overrides: Any) -> Any:
    """2 down blocks with cross attention of widths 32 and 64, and a mid block."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 48,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**config, **overrides}).eval()


def tiny_sd_pipeline(seed: int = 0, prediction_type: str = "epsilon", **overrides: Any) -> Any:
    """`StableDiffusionPipeline` with a character tokenizer of 16 tokens and random weights."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(model_max_length=16)
        return StableDiffusionPipeline(
            unet=tiny_unet(**overrides),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                prediction_type=prediction_type,
            ),
            vae=tiny_vae(4, scaling_factor=0.18215, shift_factor=None),
            text_encoder=clip_text_encoder(tokenizer, hidden=48, projection=False),
            tokenizer=tokenizer,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
