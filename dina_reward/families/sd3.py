"""Stable Diffusion 3 and 3.5 (Medium, Large): `SD3Transformer2DModel`, rectified flow, 16-channel latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dina_reward.families.backbone import Backbone, BlockInputs, of_rows
from dina_reward.families.base import JOINT_ATTENTION, ModelFamily, RewardDefaults, config_options
from dina_reward.families.conditioning import Conditioning
from dina_reward.families.layout import check_layout
from dina_reward.families.registry import register_family


class SD3Backbone(Backbone):
    """First blocks of an `SD3Transformer2DModel`, called exactly as the full model calls them.

    The text stream's input projection runs once per unique prompt; rows pick their prompt afterwards.
    """

    embedders = ("pos_embed", "time_text_embed", "context_embedder")
    block_lists = ("transformer_blocks",)

    def embed(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None
    ) -> BlockInputs:
        text = self.context_embedder(conditioning.prompt_embeds)
        text, pooled = of_rows(prompt_index, text, conditioning.pooled_prompt_embeds)
        temb = self.time_text_embed(timestep, pooled)
        patch = self.pos_embed.patch_size
        return BlockInputs(
            self.pos_embed(latents).contiguous(),
            text,
            temb,
            [{"temb": temb}],
            grid=(latents.shape[-2] // patch, latents.shape[-1] // patch),
        )


@register_family
class SD3Family(ModelFamily):
    """Stable Diffusion 3 / 3.5."""

    name = "sd3"
    denoiser_classes = ("SD3Transformer2DModel",)
    pipeline_classes = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    signature_keys = (
        "patch_size",
        "in_channels",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
        "caption_projection_dim",
        "pos_embed_max_size",
        "qk_norm",
    )
    backbone_class = SD3Backbone
    policy_lora_targets = tuple(f"attn.{name}" for name in JOINT_ATTENTION)
    reward_lora_targets = JOINT_ATTENTION
    reference_backbone_class = "SD3Backbone"

    def backbone_signature(self, denoiser_config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        dual = [i for i in denoiser_config.get("dual_attention_layers") or () if i < num_layers]
        return {**super().backbone_signature(denoiser_config, num_layers), "dual_attention_layers": dual}

    def reward_defaults(self, denoiser_config: Mapping[str, Any]) -> RewardDefaults:
        if (denoiser_config["num_layers"], denoiser_config["attention_head_dim"]) == (24, 64):  # Medium
            return RewardDefaults(12, (4, 8, 12), published=True)
        return super().reward_defaults(denoiser_config)

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, latent_shape: Sequence[int]) -> None:
        if not scheduler.config.get("use_dynamic_shifting"):
            super().set_timesteps(scheduler, num_inference_steps, latent_shape)
            return
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        tokens = (latent_shape[-2] // 2) * (latent_shape[-1] // 2)
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(scheduler.config[key] for key in keys))
        scheduler.set_timesteps(num_inference_steps, device="cpu", mu=mu)

    def check_latents(self, latents: Tensor, denoiser_config: Mapping[str, Any]) -> None:
        patch = self.latent_multiple(denoiser_config)
        check_layout(latents, self.name, channels=self.latent_channels(denoiser_config), multiple=patch)
        limit = int(denoiser_config["pos_embed_max_size"]) * patch
        if max(latents.shape[-2:]) > limit:
            raise ValueError(
                f"latents are {latents.shape[-2]} x {latents.shape[-1]}; each side may be at most {limit} for this model's "
                "position table"
            )

    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(denoiser_config["joint_attention_dim"]), int(denoiser_config["pooled_projection_dim"])

    def embeds_length(self, pipeline: Any, max_sequence_length: int | None) -> int | None:
        return int(pipeline.tokenizer_max_length) + (max_sequence_length or 256)

    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, **options
        )
        return Conditioning(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds)

    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> Backbone:
        view = super().build_backbone(denoiser, num_layers=num_layers, visual_taps=visual_taps, text_taps=text_taps)
        if num_layers in text_taps and denoiser.transformer_blocks[num_layers - 1].context_pre_only:
            raise ValueError(
                f"block {num_layers} is the model's last and returns no text tokens; "
                f"tap text at earlier blocks than {tuple(text_taps)}"
            )
        return view

    def load_denoiser(self, model_id: str, *, num_layers: int | None = None, **kwargs: Any) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        config = SD3Transformer2DModel.load_config(model_id, **config_options(kwargs))
        if num_layers is None or num_layers >= config["num_layers"]:
            return SD3Transformer2DModel.from_pretrained(model_id, **kwargs)
        # The class always builds its last block without a text output, so one more block than needed is asked for
        # and dropped; its mismatched weights never matter.
        transformer = SD3Transformer2DModel.from_pretrained(
            model_id, num_layers=num_layers + 1, ignore_mismatched_sizes=True, low_cpu_mem_usage=False, **kwargs
        )
        transformer.transformer_blocks = transformer.transformer_blocks[:num_layers]
        return transformer

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        return denoiser(
            hidden_states=latents.to(conditioning.prompt_embeds.dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled_prompt_embeds,
            return_dict=False,
        )[0].float()
