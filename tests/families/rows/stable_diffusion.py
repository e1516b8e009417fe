"""Stable Diffusion 1.x and 2.x."""

from typing import Any

from torch import Tensor

from tests.families.row import Row, Setup
from tests.tiny_models import tiny_sd_pipeline


def unet_output(output: Any, setup: Setup) -> tuple[Tensor, Tensor]:
    hidden = output[0] if isinstance(output, tuple) else output
    return setup.conditioning.prompt_embeds, hidden.flatten(2).transpose(1, 2)


ROW = Row(
    "stable_diffusion",
    tiny_sd_pipeline,
    latents=(2, 4, 8, 12),
    num_layers=3,
    taps=(2, 3),
    blocks=lambda backbone: [*backbone.down_blocks, backbone.mid_block],
    block_output=unet_output,
    pixels_per_side=8,
    arguments={"guidance_scale": 1.0},
    guided=(3.0, {"guidance_scale": 3.0, "negative_prompt": ""}),
)
