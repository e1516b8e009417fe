"""Stable Diffusion XL: image size and pooled text in the timestep embedding, the empty prompt, latent statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.families import Conditioning, family_of, get_family
from dina_reward.families.stable_diffusion_xl import size_ids
from tests.families.rows.stable_diffusion_xl import tiny_sdxl_pipeline
from tests.tiny_models import tiny_unet


FAMILY = get_family("stable_diffusion_xl")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_sdxl_pipeline()


def rollout(pipeline: Any, noise: Tensor, guidance_scale: float) -> Tensor:
    policy = Policy(pipeline, rank=2, alpha=4, guidance_scale=guidance_scale)
    bound = policy.bind(policy.encode(["a cat"], CPU), policy.encode_negative(CPU))
    return sample(bound, noise, policy.sampler(2, noise.shape[1:])).latents


def test_time_ids_are_those_of_the_pipeline_for_the_latents_size(pipeline: Any) -> None:
    noise, seen = torch.randn(1, 4, 8, 12), []

    def record(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        seen.append(arguments["added_cond_kwargs"])

    handle = pipeline.unet.register_forward_pre_hook(record, with_kwargs=True)
    pipeline("a cat", height=64, width=96, latents=noise, num_inference_steps=1, output_type="latent")
    handle.remove()
    assert size_ids(noise, torch.float32).tolist() == [[64, 96, 0, 0, 64, 96]]
    assert torch.equal(size_ids(noise, torch.float32).expand(2, -1), seen[0]["time_ids"])
    conditioning = FAMILY.encode_prompts(pipeline, ["a cat"])
    assert torch.equal(conditioning.pooled_prompt_embeds, seen[0]["text_embeds"][1:])
    assert (conditioning.prompt_embeds.shape, seen[0]["text_embeds"].shape[-1]) == ((1, 16, 48), 32)
    assert FAMILY.text_sizes(pipeline.unet.config) == (48, 32)


@torch.no_grad()
def test_timestep_embedding_carries_size_and_pooled_prompt(pipeline: Any) -> None:
    backbone = FAMILY.build_backbone(pipeline.unet, num_layers=1, visual_taps=(1,), text_taps=(1,))
    conditioning = FAMILY.encode_prompts(pipeline, ["a cat", "two dogs"])
    timestep = torch.full((2,), 500.0)
    one, two = (backbone(torch.zeros(2, 4, *size), timestep, conditioning).temb for size in ((8, 12), (12, 8)))
    assert float((one - two).abs().max()) > 1e-4
    assert float((one[0] - one[1]).abs().max()) > 1e-4
    same = Conditioning(conditioning.prompt_embeds, conditioning.pooled_prompt_embeds[[0, 0]])  # type: ignore[index]
    embedded = backbone(torch.zeros(2, 4, 8, 12), timestep, same).temb
    torch.testing.assert_close(embedded[0], embedded[1], rtol=0, atol=1e-6)


def test_v_prediction_rollout_equals_the_pipelines_own() -> None:
    pipeline, noise = tiny_sdxl_pipeline(prediction_type="v_prediction"), torch.randn(1, 4, 8, 12)
    arguments = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 1.0}
    expected = pipeline("a cat", latents=noise, **arguments).images
    torch.testing.assert_close(
        rollout(pipeline, noise, 1.0), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_negative_prompt_is_the_empty_one_and_not_zeros() -> None:
    pipeline, noise = tiny_sdxl_pipeline(), torch.randn(1, 4, 8, 12)
    assert pipeline.config.force_zeros_for_empty_prompt
    arguments = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 7.0}
    zeros, empty = (
        pipeline("a cat", latents=noise, negative_prompt=negative, **arguments).images for negative in (None, "")
    )
    atol = 1e-5 * float(empty.abs().max())
    torch.testing.assert_close(rollout(pipeline, noise, 7.0), empty, rtol=0, atol=atol)
    assert float((zeros - empty).abs().max()) > 100 * atol


@torch.no_grad()
def test_images_are_scaled_by_the_statistics_of_the_latents(pipeline: Any) -> None:
    """The inverse of what the pipeline does before it decodes; with only one of the two, neither is used."""
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    latents = FAMILY.encode_images(pipeline, [image])
    config = pipeline.vae.config
    mode = pipeline.vae.encode(pipeline.image_processor.preprocess([image])).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (config.latents_mean, config.latents_std))
    torch.testing.assert_close(latents, (mode - mean) * 0.13025 / std)
    plain = tiny_sdxl_pipeline(vae={"latents_std": None})
    torch.testing.assert_close(FAMILY.encode_images(plain, [image]), mode * 0.13025)
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 64, "width": 96, "num_inference_steps": 1, "generator": generator, "output_type": "pt"}
    decoded: list[Tensor] = []
    handle = plain.vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0]))
    images = plain("a cat", **arguments).images
    handle.remove()
    torch.testing.assert_close(FAMILY.decode_latents(plain, decoded[0] * 0.13025), images, rtol=0, atol=1e-5)


def test_float16_autoencoders_that_overflow_run_in_float32() -> None:
    pipeline = tiny_sdxl_pipeline()
    pipeline.vae.to(torch.float16)
    seen: list[torch.dtype] = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    pipeline.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    latents = FAMILY.encode_images(pipeline, [Image.new("RGB", (64, 64))])
    FAMILY.decode_latents(pipeline, latents)
    assert seen == [torch.float32, torch.float32]
    assert pipeline.vae.dtype == torch.float16
    pipeline.vae.register_to_config(force_upcast=False)
    FAMILY.decode_latents(pipeline, latents)
    assert seen[2] == torch.float16


def test_the_two_unet_families_refuse_each_others_models(pipeline: Any) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    assert family_of(pipeline) is FAMILY
    assert family_of(pipeline.unet) is FAMILY
    assert family_of(StableDiffusionXLImg2ImgPipeline.__new__(StableDiffusionXLImg2ImgPipeline)) is FAMILY
    taps: dict[str, Any] = {"num_layers": 1, "visual_taps": (1,), "text_taps": (1,)}
    with pytest.raises(ValueError, match=r"'addition_embed_type': 'text_time'.*of a StableDiffusionPipeline alone"):
        get_family("stable_diffusion").build_backbone(pipeline.unet, **taps)
    with pytest.raises(ValueError, match=r"'addition_embed_type': None.*of a StableDiffusionXLPipeline alone"):
        FAMILY.build_backbone(tiny_unet(), **taps)
    with pytest.raises(ValueError, match=r"'in_channels': 9"):
        FAMILY.build_backbone(tiny_sdxl_pipeline(in_channels=9).unet, **taps)


def test_refiners_are_refused() -> None:
    refiner = tiny_sdxl_pipeline()
    refiner.text_encoder = None
    with pytest.raises(ValueError, match="is an SDXL refiner.*supports SDXL base models with both encoders"):
        FAMILY.encode_prompts(refiner, ["a cat"])


def test_defaults_and_signature(pipeline: Any) -> None:
    config = pipeline.unet.config
    defaults = FAMILY.reward_defaults(config)
    assert (defaults.num_layers, defaults.taps, defaults.published) == (3, (1, 2, 3), False)
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim", "transformer_layers_per_block"):
        changed = {**config, key: 99}
        assert FAMILY.backbone_signature(config, 3) != FAMILY.backbone_signature(changed, 3)
    with pytest.raises(ValueError, match=r"needs pooled_prompt_embeds of shape \(batch, 32\)"):
        FAMILY.check_conditioning(Conditioning(torch.zeros(1, 16, 48)), config)
    with pytest.raises(ValueError, match=r"max_sequence_length is 8.*tokenizer's 16 tokens"):
        FAMILY.encode_prompts(pipeline, ["a cat"], max_sequence_length=8)
