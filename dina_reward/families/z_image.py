"""Z-Image and Z-Image-Turbo: `ZImageTransformer2DModel`, rectified flow, one stream of image and caption tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dina_reward.families.backbone import Backbone, of_rows
from dina_reward.families.base import ModelFamily, RewardDefaults
from dina_reward.families.conditioning import Conditioning, FeatureSizes, TapFeatures
from dina_reward.families.packing import exponential_shift
from dina_reward.families.registry import register_family


PATCH = 2
"""Latent pixels per token and side."""

EMBEDDER = f"{PATCH}-1"
"""Name of the patch embedder in the model: ``patch_size-f_patch_size``."""

SEQUENCE_MULTIPLE = 32
"""The model pads image and caption, each on its own, to a multiple of this."""

TIME_CHANNELS = 256
"""Width of the time embedding, unless the model is narrower."""

Count = TypeVar("Count", int, Tensor)


def padded_length(tokens: Count) -> Count:
    """Next multiple of `SEQUENCE_MULTIPLE`, of one length or of many."""
    return (tokens + SEQUENCE_MULTIPLE - 1) // SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE


def patchify(latents: Tensor) -> Tensor:
    """``(batch, channels, height, width)`` -> ``(batch, tokens, 4 channels)``, channels innermost in a token."""
    patches = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class ZImageBackbone(Backbone):
    """First blocks of a `ZImageTransformer2DModel` over ``[image, caption]`` sequences, prepared without loops over rows.

    Captions are padded as in the model: the model's own padding token up to their own multiple of 32, which blocks attend
    to, then tokens that no block attends to, up to the longest caption. Captions are embedded and refined once per unique
    prompt. Visual taps are the image tokens without padding, text taps the caption with its mask.
    """

    embedders = (
        *("all_x_embedder", "t_embedder", "cap_embedder", "x_pad_token", "cap_pad_token"),
        *("noise_refiner", "context_refiner"),
    )
    block_lists = ("layers",)

    def __init__(self, denoiser: Any, **taps: Any) -> None:
        super().__init__(denoiser, **taps)
        # No module: it makes its tables in the first call and moves them to the device of each. A copy and a call here keep
        # that out of compiled code, and apart from a generator on another device.
        self.rope_embedder = copy.copy(denoiser.rope_embedder)
        self.rope_embedder(torch.zeros(1, 3, dtype=torch.int64))
        self.t_scale = float(denoiser.config["t_scale"])

    def forward(
        self, latents: Tensor, timestep: Tensor, conditioning: Conditioning, prompt_index: Tensor | None = None
    ) -> TapFeatures:
        temb = self.t_embedder((1000 - timestep) / 1000 * self.t_scale).type_as(latents)
        mask = conditioning.token_mask
        tokens = mask.shape[1]
        caption, caption_rotary, readable, length = self._captions(conditioning.prompt_embeds, mask)
        caption, readable, length, mask = of_rows(prompt_index, caption, readable, length, mask)
        image, image_rotary = self._images(latents, length, temb)
        grid = (latents.shape[-2] // PATCH, latents.shape[-1] // PATCH)
        start = image.shape[1]
        hidden = torch.cat([image, caption], dim=1)
        attended = torch.cat([readable.new_ones(image.shape[:2]), readable], dim=1)
        rotary = torch.cat([image_rotary, caption_rotary.expand(len(hidden), -1, -1)], dim=1)
        features = TapFeatures([], [], temb=temb, text_mask=mask, grid=grid)
        for number, layer in enumerate(self.layers, start=1):
            hidden = self.run(layer, hidden, attended, rotary, temb)
            self.tap(features, number, hidden[:, : grid[0] * grid[1]], hidden[:, start : start + tokens])
        return features

    def _captions(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Refined captions of the unique prompts, their rotations, what may be attended to, and their padded lengths."""
        total = padded_length(mask.shape[1])
        place = torch.arange(total, device=mask.device)
        length = padded_length(mask.sum(dim=1))
        attended = place < length[:, None]
        pad = total - mask.shape[1]
        words = nn.functional.pad(mask, (0, pad))[..., None]
        caption = self.cap_embedder(nn.functional.pad(embeds, (0, 0, 0, pad)))
        caption = torch.where(words, caption, self.cap_pad_token)
        rotary = self.rope_embedder(torch.stack([place + 1, place * 0, place * 0], dim=-1))[None]
        for layer in self.context_refiner:
            caption = self.run(layer, caption, attended, rotary)
        return caption, rotary, attended, length

    def _images(self, latents: Tensor, caption_length: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """Refined image tokens, padded, and their rotations: an image comes after its caption on the first axis."""
        rows, columns = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
        image = self.all_x_embedder[EMBEDDER](patchify(latents))
        pad = padded_length(rows * columns) - rows * columns
        image = torch.cat([image, self.x_pad_token.expand(len(image), pad, -1)], dim=1)
        ids = torch.zeros(len(image), rows, columns, 3, dtype=torch.int64, device=latents.device)
        ids[..., 0] = (caption_length + 1)[:, None, None]
        ids[..., 1] = torch.arange(rows, device=latents.device)[:, None]
        ids[..., 2] = torch.arange(columns, device=latents.device)
        ids = nn.functional.pad(ids.flatten(1, 2), (0, 0, 0, pad))
        rotary = self.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
        for layer in self.noise_refiner:
            image = self.run(layer, image, None, rotary, temb)
        return image, rotary


@register_family
class ZImageFamily(ModelFamily):
    """Z-Image and Z-Image-Turbo.

    ``guidance_scale`` is, as everywhere in this package, ``negative + scale (positive - negative)`` and runs above 1. The
    pipeline counts from 0: the same guidance is ``guidance_scale - 1`` there. Turbo is sampled without, at 1 (0 in the
    pipeline).
    """

    name = "z_image"
    denoiser_classes = ("ZImageTransformer2DModel",)
    pipeline_classes = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    layer_keys = ("n_layers",)
    signature_keys = (
        "all_patch_size",
        "all_f_patch_size",
        "in_channels",
        "dim",
        "n_refiner_layers",
        "n_heads",
        "n_kv_heads",
        "norm_eps",
        "qk_norm",
        "cap_feat_dim",
        "siglip_feat_dim",
        "rope_theta",
        "t_scale",
        "axes_dims",
    )
    backbone_class = ZImageBackbone
    has_text_mask = True

    def check_supported(self, denoiser_config: Mapping[str, Any]) -> None:
        """Raises a `ValueError` for a model of other patches, or one that is conditioned on images as well."""
        patches = list(zip(denoiser_config["all_patch_size"], denoiser_config["all_f_patch_size"], strict=True))
        if (PATCH, 1) not in patches:
            raise ValueError(
                f"this Z-Image model has patches {patches} (size, frames); {self.name} supports those with ({PATCH}, 1)"
            )
        if denoiser_config.get("siglip_feat_dim") is not None:
            raise ValueError(
                f"this Z-Image model has siglip_feat_dim={denoiser_config['siglip_feat_dim']}, as the Omni models that also "
                f"take images; {self.name} supports text-to-image models alone"
            )

    def check_pipeline(self, pipeline: Any) -> None:
        self.check_supported(pipeline.transformer.config)

    def feature_sizes(self, denoiser_config: Mapping[str, Any]) -> FeatureSizes:
        width = int(denoiser_config["dim"])
        return FeatureSizes(hidden=width, temb=min(width, TIME_CHANNELS))

    def reward_defaults(self, denoiser_config: Mapping[str, Any]) -> RewardDefaults:
        if (denoiser_config["n_layers"], denoiser_config["dim"]) == (30, 3840):
            return RewardDefaults(16, (4, 8, 12, 16), head_width=1536, lora_rank=32, published=True)
        return super().reward_defaults(denoiser_config)

    def set_timesteps(self, scheduler: Any, num_inference_steps: int, latent_shape: Sequence[int]) -> None:
        sigmas = torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, device="cpu", mu=exponential_shift(scheduler, latent_shape))

    def latent_multiple(self, denoiser_config: Mapping[str, Any]) -> int:
        return PATCH

    def check_latents(self, latents: Tensor, denoiser_config: Mapping[str, Any]) -> None:
        super().check_latents(latents, denoiser_config)
        limits = [int(entries) * PATCH for entries in denoiser_config["axes_lens"][1:]]
        if latents.shape[-2] > limits[0] or latents.shape[-1] > limits[1]:
            raise ValueError(
                f"latents are {latents.shape[-2]} x {latents.shape[-1]}; this model's position tables reach {limits[0]} x "
                f"{limits[1]}"
            )

    def text_sizes(self, denoiser_config: Mapping[str, Any]) -> tuple[int, int | None]:
        return int(denoiser_config["cap_feat_dim"]), None

    def encode(self, pipeline: Any, prompts: list[str], **options: Any) -> Conditioning:
        captions, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **options)
        lengths = torch.tensor([len(caption) for caption in captions], device=captions[0].device)
        embeds = pad_sequence(captions, batch_first=True)
        return Conditioning(
            prompt_embeds=embeds,
            prompt_embeds_mask=torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None],
        )

    def build_backbone(
        self, denoiser: Any, *, num_layers: int, visual_taps: Sequence[int], text_taps: Sequence[int]
    ) -> Backbone:
        self.check_supported(denoiser.config)
        return super().build_backbone(denoiser, num_layers=num_layers, visual_taps=visual_taps, text_taps=text_taps)

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        embeds, lengths = conditioning.prompt_embeds, conditioning.lengths
        prediction = denoiser(
            list(latents.to(embeds.dtype).unsqueeze(2).unbind(0)),
            (1000 - timestep) / 1000,
            [caption[:length] for caption, length in zip(embeds, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(list(prediction)).squeeze(2).float()
