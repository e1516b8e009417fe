"""FLUX.2: dev with guidance as an input, layouts and normalisation, latents that Klein returns, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from dina_reward import LatentReward
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.families import RewardDefaults, family_of, get_family
from dina_reward.families.flux2 import normalize_latents, position_ids
from tests.families.row import PROMPTS, Setup
from tests.families.rows.flux2 import CONFIG, ROW, qwen3_text_encoder, tiny_flux2_vae, tiny_klein_pipeline
from tests.tiny_models import qwen_tokenizer


FAMILY = get_family("flux2")
CPU = torch.device("cpu")
SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def klein() -> Any:
    return tiny_klein_pipeline()


def tiny_dev_pipeline(seed: int = 0) -> Any:
    """`Flux2Pipeline`; a text-only tokenizer and a Qwen3 stand in for the Pixtral processor and Mistral 3."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = qwen_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
        )
        return Flux2Pipeline(
            transformer=Flux2Transformer2DModel(**{**CONFIG, "guidance_embeds": True}).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=tiny_flux2_vae(),
            text_encoder=qwen3_text_encoder(tokenizer, num_layers=30),
            tokenizer=tokenizer,
        )


@torch.no_grad()
def test_dev_rollout_equals_its_pipeline_with_guidance_as_an_input() -> None:
    pipeline = tiny_dev_pipeline()
    assert family_of(pipeline) is FAMILY
    noise = torch.randn(1, 128, 4, 6, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 4, "max_sequence_length": 16, "latents": noise, **SIZE}
    expected, other = (
        pipeline(prompt=PROMPTS[1], guidance_scale=scale, output_type="latent", **call).images for scale in (2.5, 4.0)
    )
    pixels = pipeline(prompt=PROMPTS[1], guidance_scale=2.5, output_type="pt", **call).images
    policy = Policy(pipeline, rank=2, alpha=4, guidance_scale=2.5, max_sequence_length=16)
    assert policy.encode_negative(CPU) is None
    bound = policy.bind(policy.encode([PROMPTS[1]], CPU), None)
    latents = sample(bound, noise, policy.sampler(4, noise.shape[1:])).latents
    assert expected.shape == (1, 24, 128)
    atol = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(FAMILY.pack_latents(latents), expected, rtol=0, atol=atol)
    assert float((other - expected).abs().max()) > 100 * atol
    torch.testing.assert_close(FAMILY.decode_latents(pipeline, latents), pixels, rtol=0, atol=1e-5)


@torch.no_grad()
def test_dev_backbone_is_told_the_guidance_of_its_pipelines_default() -> None:
    setup = Setup.of(ROW)
    setup.pipeline = tiny_dev_pipeline()
    seen: list[torch.Tensor] = []
    backbone = setup.backbone()
    handle = backbone.single_transformer_blocks[0].register_forward_hook(lambda _, __, output: seen.append(output))
    setup.predict(guidance_scale=4.0)
    setup.predict(guidance_scale=3.0)
    handle.remove()
    features = backbone(setup.latents, setup.timestep, setup.conditioning)
    torch.testing.assert_close(features.visual[-1], seen[0][:, 16:], rtol=0, atol=1e-6)
    assert float((features.visual[-1] - seen[1][:, 16:]).abs().max()) > 1e-4


def test_layouts_and_positions_are_those_of_the_pipeline(klein: Any) -> None:
    latents = torch.randn(2, 128, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FAMILY.pack_latents(latents), klein._pack_latents(latents))
    text, image = position_ids(latents, 7)
    assert torch.equal(text, klein._prepare_text_ids(torch.zeros(1, 7, 1))[0].float())
    assert torch.equal(image, klein._prepare_latent_ids(latents)[0].float())
    with pytest.raises(ValueError, match="image size 64 x 72 must be divisible by 16"):
        FAMILY.latent_shape(klein, 64, 72, klein.transformer.config)


@torch.no_grad()
def test_encoded_images_are_those_of_the_pipeline(klein: Any) -> None:
    image = Image.effect_noise((96, 64), 50).convert("RGB")
    pixels = klein.image_processor.preprocess(image)
    expected = klein._encode_vae_image(pixels, generator=None)
    latents = FAMILY.encode_images(klein, [image])
    assert latents.shape == (1, 128, 4, 6)
    torch.testing.assert_close(latents, expected)


@torch.no_grad()
def test_latents_that_klein_returns_are_refused_until_normalised(klein: Any) -> None:
    last: dict[str, torch.Tensor] = {}

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last.update(tensors)
        return tensors

    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 16, **SIZE}
    returned = klein(prompt="a cat", output_type="latent", callback_on_step_end=keep, **call).images
    assert returned.shape == (1, 32, 8, 12)
    normal = normalize_latents(klein.vae, returned)
    tokens = last["latents"]
    torch.testing.assert_close(FAMILY.pack_latents(normal), tokens, rtol=0, atol=1e-5)
    reward = LatentReward.from_config(Setup.of(ROW).reward_config(), pipeline=klein).eval()
    with pytest.raises(
        ValueError, match=r"as Flux2KleinPipeline returns them.*flux2.normalize_latents\(pipeline.vae, latents\)"
    ):
        reward(returned, "a cat", seed=0)
    scores = reward(tokens, "a cat", seed=0, height=64, width=96)
    torch.testing.assert_close(reward(normal, "a cat", seed=0), scores, rtol=0, atol=1e-4)


def test_guidance_of_a_distilled_klein_is_refused() -> None:
    pipeline = tiny_klein_pipeline(is_distilled=True)
    with pytest.raises(ValueError, match="distilled to few steps .* set guidance_scale to 1"):
        Policy(pipeline, rank=2, alpha=4, guidance_scale=3.0).encode_negative(CPU)
    pipeline = tiny_klein_pipeline(is_distilled=True)
    assert Policy(pipeline, rank=2, alpha=4).encode_negative(CPU) is None


def test_every_weight_has_a_gradient() -> None:
    setup = Setup.of(ROW)
    policy = Policy(setup.pipeline, rank=2, alpha=4, train_full_model=True)
    setup.predict(policy.denoiser).square().sum().backward()
    assert [name for name, parameter in policy.trainable_parameters().items() if parameter.grad is None] == []


def test_defaults_of_the_published_size() -> None:
    config = {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "attention_head_dim": 128}
    assert FAMILY.reward_defaults(config) == RewardDefaults(28, (9, 19, 28), head_width=1536)
