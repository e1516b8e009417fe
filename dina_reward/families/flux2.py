"""FLUX.2 dev and Klein: `Flux2Transformer2DModel`, rectified flow shifted by image size, patchified normalised latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dina_reward.families.autoencoding import image_pixels
from dina_reward.families.backbone import Backbone, BlockInputs, of_rows
from dina_reward.families.base import JOINT_ATTENTION, ModelFamily, config_of
from dina_reward.families.conditioning import Conditioning
from dina_reward.families.layout import token_grid
from dina_reward.families.packing import PIXELS_PER_TOKEN
from dina_reward.families.registry import register_family


REWARD_GUIDANCE = 4.0
"""What the reward's backbone is told where the model takes a guidance scale as an input."""


def position_ids(latents: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
    """Ids of text tokens (0, 0, 0, token) and image tokens (0, row, column, 0), shapes ``(tokens, 4)``."""
    rows, columns = latents.shape[-2:]
    text = torch.zeros(text_tokens, 4, device=latents.device)
    text[:, 3] = torch.arange(text_tokens, device=latents.device)
    image = torch.zeros(rows, columns, 4, device=latents.device)
    image[..., 1] = torch.arange(rows, device=latents.device)[:, None]
    image[..., 2] = torch.arange(columns, device=latents.device)
    return text, image.flatten(0, 1)


def to_tokens(latents: Tensor) -> Tensor:
    """``(batch, channels, height, width)`` -> ``(batch, height * width, channels)``."""
    return latents.flatten(2).transpose(1, 2)


def to_spatial(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of `to_tokens`; ``grid`` is the number of tokens per column and row."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def normalize_latents(vae: Any, latents: Tensor) -> Tensor:
    """Latents of the autoencoder in the form that the transformer sees: 2 x 2 patches, standardised per channel.

    A `Flux2KleinPipeline` returns the autoencoder's latents for ``output_type="latent"``; a `Flux2Pipeline` does not.

    Args:
        vae: the `AutoencoderKLFlux2`, whose batch norm holds mean and variance.
        latents: shape ``(batch, 32, height / 8, width / 8)``.

    Returns:
        `Tensor`: shape ``(batch, 128, height / 16, width / 16)``, float32.
    """
    mean, std = _statistics(vae, latents.device)
    return (F.pixel_unshuffle(latents.float(), 2) - mean) / std


class Flux2Backbone(Backbone):
    """First blocks of a `Flux2Transformer2DModel`: the double-stream ones, then the single-stream ones.

    All blocks of a kind share one modulation, which is computed once.
    """

    embedders = (
        "pos_embed",
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "x_embedder",
        "context_embedder",
    )
    block_lists = ("transformer_blocks", "single_transformer_blocks")

    def __init__(self, denoiser: Any, **taps: Any) -> None:
        super().__init__(denoiser, **taps)
        self.guidance_embeds = bool(denoiser.config["guidance_embeds"])

    def embed(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None
    ) -> BlockInputs:
        (text,) = of_rows(prompt_index, self.context_embedder(conditioning.prompt_embeds))
        # The model takes timesteps and guidance divided by 1000, multiplies them again, and embeds them in its own dtype.
        timestep = timestep.to(latents.dtype)
        guidance = torch.full_like(timestep, 1000 * REWARD_GUIDANCE) if self.guidance_embeds else None
        temb = self.time_guidance_embed(timestep, guidance)
        rotary = self.pos_embed(torch.cat(position_ids(latents, text.shape[1])))
        double = {
            "temb_mod_img": self.double_stream_modulation_img(temb),
            "temb_mod_txt": self.double_stream_modulation_txt(temb),
            "image_rotary_emb": rotary,
        }
        single = {
            "temb_mod": self.single_stream_modulation(temb),
            "image_rotary_emb": rotary,
            "split_hidden_states": True,
        }
        grid = (latents.shape[-2], latents.shape[-1])
        return BlockInputs(self.x_embedder(to_tokens(latents)), text, temb, [double, single], grid=grid)


@register_family
class Flux2Family(ModelFamily):
    """FLUX.2. Of dev, ``guidance_scale`` is an input of the model; of Klein, it is that of classifier-free guidance.

    The spatial layout is the transformer's: ``(batch, 128, height / 16, width / 16)``, standardised. Klein models that were
    distilled to few steps (``is_distilled`` of their pipeline) run without guidance, at a scale of 1.
    """

    name = "flux2"
    denoiser_classes = ("Flux2Transformer2DModel",)
    pipeline_classes = ("Flux2Pipeline", "Flux2KleinPipeline")
    layer_keys = ("num_layers", "num_single_layers")
    signature_keys = (
        *("patch_size", "in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim"),
        *("mlp_ratio", "timestep_guidance_channels", "guidance_embeds", "axes_dims_rope", "rope_theta", "eps"),
    )
    backbone_class = Flux2Backbone
    policy_lora_targets = (*JOINT_ATTENTION, "to_qkv_mlp_proj")
    reward_lora_targets = policy_lora_targets

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, latent_shape: Sequence[int]) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        mu = compute_empirical_mu(latent_shape[-2] * latent_shape[-1], num_inference_steps)
        sigmas = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64).tolist()
        own_sigmas = scheduler.config.get("use_flow_sigmas")
        scheduler.set_timesteps(num_inference_steps, sigmas=None if own_sigmas else sigmas, device="cpu", mu=mu)

    def check_latents(self, latents: Tensor, denoiser_config: Mapping[str, Any]) -> None:
        channels = self.latent_channels(denoiser_config)
        if latents.ndim == 4 and latents.shape[1] == channels // 4:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, as Flux2KleinPipeline returns them: the autoencoder's, neither "
                f"patchified nor standardised; {self.name} takes (batch, {channels}, height, width). Convert them with "
                "`dina_reward.families.flux2.normalize_latents(pipeline.vae, latents)`"
            )
        super().check_latents(latents, denoiser_config)

    def unpack_latents(
        self, latents: Tensor, denoiser_config: Mapping[str, Any], height: int | None = None, width: int | None = None
    ) -> Tensor:
        if latents.ndim != 3 or latents.shape[-1] != self.latent_channels(denoiser_config):
            return latents
        return to_spatial(latents, token_grid(latents.shape[1], height, width, PIXELS_PER_TOKEN, self.name))

    def pack_latents(self, latents: Tensor) -> Tensor:
        return to_tokens(latents)

    def latent_shape(
        self, pipeline: Any, height: int, width: int, denoiser_config: Mapping[str, Any], num_frames: int = 1
    ) -> tuple[int, ...]:
        channels, rows, columns = super().latent_shape(pipeline, height, width, denoiser_config, num_frames)
        if rows % 2 or columns % 2:
            raise ValueError(f"image size {height} x {width} must be divisible by {2 * pipeline.vae_scale_factor}")
        return channels, rows // 2, columns // 2

    @torch.no_grad()
    def encode_images(self, pipeline: Any, images: Sequence[Image.Image]) -> Tensor:
        pixels = image_pixels(pipeline, images, 2 * pipeline.vae_scale_factor)
        return normalize_latents(pipeline.vae, pipeline.vae.encode(pixels).latent_dist.mode())

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor) -> Tensor:
        vae = pipeline.vae
        mean, std = _statistics(vae, latents.device)
        unscaled = F.pixel_shuffle(latents.float() * std + mean, 2)
        pixels = vae.decode(unscaled.to(vae.device, vae.dtype), return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels.float(), output_type="pt")

    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(denoiser_config["joint_attention_dim"]), None

    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        prompt_embeds, _ = pipeline.encode_prompt(prompts, **options)
        return Conditioning(prompt_embeds=prompt_embeds)

    def encode_negative(self, pipeline: Any, **options: Any) -> Conditioning:
        if pipeline.config.get("is_distilled"):
            raise ValueError(
                f"this {type(pipeline).__name__} is distilled to few steps (is_distilled) and ignores guidance; set "
                "guidance_scale to 1"
            )
        return super().encode_negative(pipeline, **options)

    def uses_negative_prompt(self, denoiser_config: Mapping[str, Any], guidance_scale: float) -> bool:
        return guidance_scale > 1 and not denoiser_config["guidance_embeds"]

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        latents = latents.to(conditioning.prompt_embeds.dtype)
        text_ids, image_ids = position_ids(latents, conditioning.prompt_embeds.shape[1])
        guided = config_of(denoiser)["guidance_embeds"]
        prediction = denoiser(
            hidden_states=to_tokens(latents),
            timestep=timestep.to(latents.dtype) / 1000,
            guidance=timestep.new_full(timestep.shape, guidance_scale, dtype=torch.float32) if guided else None,
            encoder_hidden_states=conditioning.prompt_embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return to_spatial(prediction, (latents.shape[-2], latents.shape[-1])).float()


def _statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of patchified latents, shapes ``(1, channels, 1, 1)``, float32."""
    mean = vae.bn.running_mean.to(device, torch.float32)
    std = (vae.bn.running_var.to(device, torch.float32) + vae.config.batch_norm_eps).sqrt()
    return mean[:, None, None], std[:, None, None]
