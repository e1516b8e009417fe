"""FLUX.2 Klein: classifier-free guidance; its pipeline takes spatial noise and returns the autoencoder's latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dina_reward.families.flux2 import normalize_latents
from tests.families.row import Row, Setup
from tests.tiny_models import qwen_tokenizer


CONFIG: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}


def tiny_klein_pipeline(seed: int = 0, is_distilled: bool = False, **overrides: Any) -> Any:
    """`Flux2KleinPipeline` with two double-stream and two single-stream blocks of width 32."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        return Flux2KleinPipeline(
            transformer=Flux2Transformer2DModel(**{**CONFIG, **overrides}).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_flux2_vae(),
            text_encoder=qwen3_text_encoder(tokenizer, num_layers=27),
            tokenizer=tokenizer,
            is_distilled=is_distilled,
        )


def tiny_flux2_vae() -> Any:
    """`AutoencoderKLFlux2` whose batch norm has seen latents."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def qwen3_text_encoder(tokenizer: Any, num_layers: int) -> Any:
    """`Qwen3ForCausalLM` of width 16, three layers of which are read."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config).eval()


def block_output(output: Any, setup: Setup) -> tuple[Tensor, Tensor]:
    """Single-stream blocks return one sequence, text first."""
    if isinstance(output, tuple):
        return output
    length = setup.conditioning.prompt_embeds.shape[1]
    return output[:, :length], output[:, length:]


ROW = Row(
    "flux2",
    tiny_klein_pipeline,
    latents=(2, 128, 4, 6),
    num_layers=3,
    taps=(1, 2, 3),
    blocks=lambda backbone: [*backbone.transformer_blocks, *backbone.single_transformer_blocks],
    block_output=block_output,
    pixels_per_side=16,
    arguments={"max_sequence_length": 16, "guidance_scale": 1.0},
    guided=(3.0, {"max_sequence_length": 16, "guidance_scale": 3.0}),
    given=lambda setup, noise: noise,
    returned=lambda setup, latents: setup.family.pack_latents(normalize_latents(setup.pipeline.vae, latents)),
)
