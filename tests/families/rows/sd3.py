"""Stable Diffusion 3."""

from tests.families.row import Row
from tests.tiny_models import tiny_sd3_pipeline


ROW = Row(
    "sd3",
    tiny_sd3_pipeline,
    latents=(2, 16, 8, 12),
    num_layers=2,
    taps=(1, 2),
    blocks=lambda backbone: list(backbone.transformer_blocks),
    pixels_per_side=16,
    arguments={"max_sequence_length": 16, "guidance_scale": 1.0},
    guided=(3.0, {"max_sequence_length": 16, "guidance_scale": 3.0, "negative_prompt": ""}),
)
