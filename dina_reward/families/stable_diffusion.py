"""Stable Diffusion 1.x and 2.x: `UNet2DConditionModel`, DDPM noise, epsilon- or v-prediction, 4-channel latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from dina_reward.families.backbone import Backbone, of_rows
from dina_reward.families.base import ModelFamily, RewardDefaults
from dina_reward.families.conditioning import Conditioning, FeatureSizes, TapFeatures
from dina_reward.families.registry import register_family
from dina_reward.noise import VariancePreservingNoise


LAYOUT_SETTINGS = (
    *("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "transformer_layers_per_block"),
    *("cross_attention_dim", "attention_head_dim", "num_attention_heads", "only_cross_attention", "mid_block_type"),
    *("norm_num_groups", "use_linear_projection", "time_embedding_dim", "flip_sin_to_cos", "freq_shift"),
)
PLAIN_SETTINGS: Mapping[str, Any] = {
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "center_input_sample": False,
}
"""Settings of a UNet whose only inputs are latents, timestep and prompt embeddings."""


class UNetBackbone(Backbone):
    """Down blocks, then mid block of a `UNet2DConditionModel`, called exactly as the full model calls them.

    Blocks are numbered from 1: the down blocks ``1 .. D``, the mid block ``D + 1``. A visual tap is what its block
    returns (for a down block: after its downsampler), as ``height * width`` tokens. The head puts the taps of one place
    side by side, so taps of a finer grid are average-pooled to the grid of the last one. A UNet does not transform text:
    every text tap is the prompt embeddings as given, and one is enough.
    """

    embedders: ClassVar[tuple[str, ...]] = ("conv_in", "time_proj", "time_embedding")

    def __init__(self, denoiser: Any, **taps: Any) -> None:
        super().__init__(denoiser, **taps)
        self.down_blocks = denoiser.down_blocks[: self.num_layers]
        self.mid_block = denoiser.mid_block if self.num_layers > len(denoiser.down_blocks) else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the order of their numbers."""
        return [*self.down_blocks, *([] if self.mid_block is None else [self.mid_block])]

    def forward(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None = None
    ) -> TapFeatures:
        (text,) = of_rows(prompt_index, conditioning.prompt_embeds)
        temb = self.embed_time(latents, timestep, conditioning, prompt_index)
        hidden = self.conv_in(latents)
        maps = []
        for number, block in enumerate(self.blocks, start=1):
            hidden = self._run_block(block, hidden, temb, text)
            if number in self.visual_taps:
                maps.append(hidden)
        rows, columns = maps[-1].shape[-2:]
        visual = [_tokens(tapped, rows, columns) for tapped in maps]
        return TapFeatures(visual=visual, text=[text] * len(self.text_taps), temb=temb, grid=(rows, columns))

    def embed_time(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None
    ) -> Tensor:
        """The conditioning vector of the blocks, shape ``(rows, temb channels)``."""
        return self.time_embedding(self.time_proj(timestep).to(latents.dtype))

    def _run_block(self, block: nn.Module, hidden: Tensor, temb: Tensor, text: Tensor) -> Tensor:
        inputs = (hidden, temb, text) if getattr(block, "has_cross_attention", False) else (hidden, temb)
        output = self.run(block, *inputs)
        return output[0] if isinstance(output, tuple) else output


def _tokens(hidden: Tensor, height: int, width: int) -> Tensor:
    if hidden.shape[-2:] != (height, width):
        hidden = F.adaptive_avg_pool2d(hidden, (height, width))
    return hidden.flatten(2).transpose(1, 2)


class UNetFamily(ModelFamily):
    """What generators on a `UNet2DConditionModel` have in common: DDPM noise, CLIP text of one length, 4-channel latents."""

    denoiser_classes = ("UNet2DConditionModel",)
    denoiser_attribute = "unet"
    backbone_class = UNetBackbone
    plain_settings: ClassVar[Mapping[str, Any]] = PLAIN_SETTINGS
    """Settings that say which inputs the UNet takes, with the only values supported."""

    def num_blocks(self, denoiser_config: Mapping[str, Any]) -> int:
        return len(denoiser_config["block_out_channels"]) + (denoiser_config.get("mid_block_type") is not None)

    def backbone_signature(self, denoiser_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        # Whole lists, also of the blocks that do not run: a model's last down block alone has no downsampler.
        return {key: denoiser_config.get(key) for key in (*LAYOUT_SETTINGS, *self.plain_settings)}

    def reward_defaults(self, denoiser_config: Mapping[str, Any]) -> RewardDefaults:
        blocks = self.num_blocks(denoiser_config)
        return RewardDefaults(blocks, tuple(range(1, blocks + 1)))

    def noise_process(self, scheduler_config: Mapping[str, Any]) -> VariancePreservingNoise:
        return VariancePreservingNoise.from_scheduler_config(scheduler_config)

    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(denoiser_config["cross_attention_dim"]), None

    def feature_sizes(self, denoiser_config: Mapping[str, Any]) -> FeatureSizes:
        widths = [int(width) for width in denoiser_config["block_out_channels"]]
        return FeatureSizes(
            hidden=(*widths, widths[-1]),
            temb=int(denoiser_config.get("time_embedding_dim") or 4 * widths[0]),
            text=int(denoiser_config["cross_attention_dim"]),
        )

    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> Backbone:
        self.check_supported(denoiser.config)
        available = len(denoiser.down_blocks) + (denoiser.mid_block is not None)
        if num_layers > available:
            raise ValueError(
                f"the reward reads {num_layers} blocks but this {type(denoiser).__name__} has {available} "
                "(down blocks, then the mid block); it belongs to another model size"
            )
        return self.backbone_class(denoiser, num_layers=num_layers, visual_taps=visual_taps, text_taps=text_taps)

    def check_supported(self, config: Mapping[str, Any]) -> None:
        """Raises a `ValueError` that lists the settings of a UNet which takes other inputs."""
        special = {key: config[key] for key, plain in self.plain_settings.items() if config.get(key, plain) != plain}
        if config["in_channels"] != config["out_channels"]:
            special["in_channels"], special["out_channels"] = config["in_channels"], config["out_channels"]
        if not isinstance(config["cross_attention_dim"], int):
            special["cross_attention_dim"] = config["cross_attention_dim"]
        if special:
            raise ValueError(
                f"this UNet has settings {special}, as inpainting, upscaling or guidance-distilled models do; {self.name} "
                f"supports text-to-image UNets of a {self.pipeline_classes[0]} alone"
            )

    def load_denoiser(self, model_id: str, *, num_layers: int | None = None, **kwargs: Any) -> nn.Module:
        from diffusers import UNet2DConditionModel

        unet: Any = UNet2DConditionModel.from_pretrained(model_id, **kwargs)
        if num_layers is None:
            return unet
        # A UNet with fewer blocks has another block layout, so the whole model is read and the rest let go.
        if num_layers <= len(unet.down_blocks):
            unet.mid_block = None
        unet.down_blocks = unet.down_blocks[:num_layers]
        unet.up_blocks = nn.ModuleList()
        unet.conv_norm_out = unet.conv_out = None
        return unet

    def check_sequence_length(self, pipeline: Any, max_sequence_length: int | None) -> None:
        """Raises a `ValueError` for another length than the tokenizer's, to which the pipeline pads every prompt."""
        length = pipeline.tokenizer.model_max_length
        if max_sequence_length not in (None, length):
            raise ValueError(
                f"max_sequence_length is {max_sequence_length}, but a {type(pipeline).__name__} pads every prompt to its "
                f"tokenizer's {length} tokens; give {length} or None"
            )


@register_family
class StableDiffusionFamily(UNetFamily):
    """Stable Diffusion 1.x and 2.x, epsilon- or v-prediction."""

    name = "stable_diffusion"
    pipeline_classes = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")

    def matches(self, denoiser_config: Mapping[str, Any]) -> bool:
        return denoiser_config.get("addition_embed_type") is None

    def embeds_length(self, pipeline: Any, max_sequence_length: int | None) -> int | None:
        return None if pipeline.tokenizer is None else int(pipeline.tokenizer.model_max_length)

    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        self.check_sequence_length(pipeline, options.get("max_sequence_length"))
        prompt_embeds, _ = pipeline.encode_prompt(
            prompts,
            device=options["device"] or pipeline.text_encoder.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return Conditioning(prompt_embeds=prompt_embeds)

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        text = conditioning.prompt_embeds
        return denoiser(latents.to(text.dtype), timestep, encoder_hidden_states=text, return_dict=False)[0].float()
