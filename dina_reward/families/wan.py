"""Wan 2.1 and 2.2 text-to-video: `WanTransformer3DModel`, rectified flow, videos ``(batch, channels, frames, h, w)``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dina_reward.families.autoencoding import image_pixels
from dina_reward.families.backbone import Backbone, BlockInputs, of_rows
from dina_reward.families.base import ModelFamily, RewardDefaults
from dina_reward.families.conditioning import Conditioning
from dina_reward.families.registry import register_family


PIPELINE_SEQUENCE_LENGTH = 512
"""Default of `WanPipeline.__call__`; its `encode_prompt` alone has another one."""

Clip = Sequence[Image.Image]
"""Frames of a video, in order."""


class WanBackbone(Backbone):
    """First blocks of a `WanTransformer3DModel`, over the tokens of all frames.

    The blocks read the text by cross attention and do not transform it: every text tap is the projected prompt embedding,
    and one is enough.
    """

    embedders = ("patch_embedding", "rope", "condition_embedder")
    block_lists = ("blocks",)

    def embed(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None
    ) -> BlockInputs:
        # Time and text are embedded apart, so the timesteps may have more rows than the prompts.
        temb, modulation, text, _ = self.condition_embedder(timestep, conditioning.prompt_embeds)
        (text,) = of_rows(prompt_index, text)
        hidden = self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
        arguments = {"temb": modulation.unflatten(1, (6, -1)), "rotary_emb": self.rope(latents)}
        return BlockInputs(hidden, text, temb, [arguments])


@register_family
class WanFamily(ModelFamily):
    """Wan 2.1 and Wan 2.2 text-to-video.

    Prompts are padded with zero vectors to ``max_sequence_length`` and the model attends to them, so that length is part
    of what it sees; there is no text mask.

    Of Wan 2.2, the 5B model can be trained (``expand_timesteps`` tells every token the same timestep). The A14B models
    split the noise levels between two denoisers and can not; a reward can use their ``transformer``, which was trained on
    the high noise levels alone. Image-to-video models take more inputs and are refused.
    """

    name = "wan"
    denoiser_classes = ("WanTransformer3DModel",)
    pipeline_classes = ("WanPipeline",)
    block_lists = ("blocks",)
    signature_keys = (
        "patch_size",
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "text_dim",
        "freq_dim",
        "ffn_dim",
        "cross_attn_norm",
        "qk_norm",
        "eps",
        "image_dim",
        "added_kv_proj_dim",
    )
    backbone_class = WanBackbone
    has_frames = True

    def check_supported(self, denoiser_config: Mapping[str, Any]) -> None:
        """Raises a `ValueError` that lists the settings of a denoiser which takes more than noisy latents and text."""
        special = {key: denoiser_config.get(key) for key in ("image_dim", "added_kv_proj_dim")}
        special = {key: value for key, value in special.items() if value is not None}
        channels = {key: denoiser_config[key] for key in ("in_channels", "out_channels")}
        if channels["out_channels"] not in (None, channels["in_channels"]):
            special |= channels
        if denoiser_config["patch_size"][0] != 1:
            special["patch_size"] = denoiser_config["patch_size"]
        if special:
            raise ValueError(
                f"this Wan model has settings {special}, as image-to-video models do; {self.name} supports the "
                "text-to-video models of a WanPipeline alone"
            )

    def check_pipeline(self, pipeline: Any) -> None:
        boundary = pipeline.config.get("boundary_ratio")
        if getattr(pipeline, "transformer_2", None) is not None or boundary is not None:
            raise ValueError(
                f"this WanPipeline has two denoisers (transformer_2, boundary_ratio {boundary}), one for high and one for "
                "low noise levels; a policy trains one denoiser for all levels: use Wan 2.1 or the 5B model of Wan 2.2"
            )
        self.check_supported(pipeline.transformer.config)

    def reward_defaults(self, denoiser_config: Mapping[str, Any]) -> RewardDefaults:
        # Eight blocks as in PRFL (arXiv 2511.21541): whole models of 30 to 40 blocks see tens of thousands of tokens.
        width = self.feature_sizes(denoiser_config).temb
        return RewardDefaults.first_half(2 * min(8, self.num_blocks(denoiser_config)), width)

    # --- latents -------------------------------------------------------------------------------------------------

    def latent_multiple(self, denoiser_config: Mapping[str, Any]) -> int:
        return int(denoiser_config["patch_size"][1])

    def check_latents(self, latents: Tensor, denoiser_config: Mapping[str, Any]) -> None:
        super().check_latents(latents, denoiser_config)
        frames, height, width = latents.shape[-3:]
        side, limit = self.latent_multiple(denoiser_config), int(denoiser_config["rope_max_seq_len"])
        if max(frames, height // side, width // side) > limit:
            raise ValueError(
                f"latents have {frames} frames of {height} x {width}; this model's position table has {limit} entries, so "
                f"at most {limit} frames and {limit * side} x {limit * side}"
            )

    def latent_shape(
        self, pipeline: Any, height: int, width: int, denoiser_config: Mapping[str, Any], num_frames: int = 1
    ) -> tuple[int, ...]:
        factor = int(pipeline.vae_scale_factor_spatial)
        step = factor * self.latent_multiple(denoiser_config)
        if height % step or width % step:
            raise ValueError(f"image size {height} x {width} must be divisible by {step}")
        frames = _latent_frames(pipeline, num_frames)
        return (self.latent_channels(denoiser_config), frames, height // factor, width // factor)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, images: Sequence[Image.Image] | Sequence[Clip]) -> Tensor:
        """Latents of videos by the pipeline's VAE, shape ``(batch, channels, frames, height, width)``, float32.

        Args:
            images: images, each a video of one frame, or clips of one length, each a sequence of frames. All of one size.

        Raises:
            ValueError: clips of different lengths, or of a length that the VAE does not take.
        """
        clips = [[entry] if isinstance(entry, Image.Image) else list(entry) for entry in images]
        lengths = sorted({len(clip) for clip in clips})
        if len(lengths) != 1:
            raise ValueError(f"videos of one batch must have one length, got {lengths} frames")
        _latent_frames(pipeline, lengths[0])
        side = int(pipeline.vae_scale_factor_spatial) * self.latent_multiple(pipeline.transformer.config)
        pixels = image_pixels(pipeline, [frame for clip in clips for frame in clip], side)
        videos = pixels.unflatten(0, (len(clips), -1)).transpose(1, 2)
        latents = pipeline.vae.encode(videos).latent_dist.mode().float()
        mean, std = _statistics(pipeline.vae, latents)
        return (latents - mean) / std

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        mean, std = _statistics(vae, latents)
        videos = vae.decode((latents.float() * std + mean).to(vae.device, vae.dtype), return_dict=False)[0]
        return pipeline.video_processor.postprocess_video(videos.float(), output_type="pt")

    # --- prompts, reward and policy ------------------------------------------------------------------------------

    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(denoiser_config["text_dim"]), None

    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        options = {"max_sequence_length": PIPELINE_SEQUENCE_LENGTH, **options}
        prompt_embeds, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **options)
        return Conditioning(prompt_embeds=prompt_embeds)

    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> Backbone:
        self.check_supported(denoiser.config)
        return super().build_backbone(denoiser, num_layers=num_layers, visual_taps=visual_taps, text_taps=text_taps)

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        return denoiser(
            hidden_states=latents.to(conditioning.prompt_embeds.dtype),
            timestep=timestep,
            encoder_hidden_states=conditioning.prompt_embeds,
            return_dict=False,
        )[0].float()


def _latent_frames(pipeline: Any, num_frames: int) -> int:
    factor = int(pipeline.vae_scale_factor_temporal)
    if num_frames < 1 or (num_frames - 1) % factor:
        raise ValueError(
            f"num_frames is {num_frames}; the VAE compresses {factor} frames into one after the first, so give a number "
            f"such as 1, {factor + 1} or {2 * factor + 1} (one more than a multiple of {factor})"
        )
    return (num_frames - 1) // factor + 1


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the VAE's own latents."""
    mean, std = (
        torch.tensor(list(vae.config[key]), device=latents.device, dtype=torch.float32).view(-1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    return mean, std
