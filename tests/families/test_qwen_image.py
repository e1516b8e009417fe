"""Qwen-Image: latents with a frame, guidance that keeps the norm, the text mask, layers without gradient, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image

from dina_reward import LatentReward
from dina_reward.alignment.policy import Policy
from dina_reward.families import Conditioning, RewardDefaults, get_family
from dina_reward.families.layout import pack_2x2
from tests.families.row import PROMPTS, Setup
from tests.families.rows.qwen_image import ROW, tiny_qwen_image_pipeline


FAMILY = get_family("qwen_image")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_qwen_image_pipeline()


def test_unpacking_agrees_with_the_pipeline_and_drops_its_frame(pipeline: Any) -> None:
    config = pipeline.transformer.config
    latents = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))
    frames = QwenImagePipeline._unpack_latents(latents, 64, 96, 8)
    assert frames.shape == (2, 16, 1, 8, 12)
    assert torch.equal(FAMILY.unpack_latents(frames, config), frames[:, :, 0])
    assert torch.equal(FAMILY.unpack_latents(latents, config, height=64, width=96), frames[:, :, 0])
    assert torch.equal(FAMILY.pack_latents(frames[:, :, 0]), latents)
    with pytest.raises(ValueError, match="qwen_image takes"):
        FAMILY.check_latents(FAMILY.unpack_latents(frames.expand(-1, -1, 3, -1, -1), config), config)


@torch.no_grad()
def test_encoded_images_are_standardised(pipeline: Any) -> None:
    image = Image.effect_noise((96, 64), 50).convert("RGB")
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(image)[:, :, None]
    mode = vae.encode(pixels).latent_dist.mode()[:, :, 0]
    latents = FAMILY.encode_images(pipeline, [image])
    assert latents.shape == (1, 16, 8, 12)
    for channel, (mean, std) in enumerate(zip(vae.config.latents_mean, vae.config.latents_std, strict=True)):
        torch.testing.assert_close(latents[:, channel] * std + mean, mode[:, channel], rtol=0, atol=1e-5)


def test_guidance_keeps_the_norm_of_every_token() -> None:
    generator = torch.Generator().manual_seed(0)
    negative, positive = (torch.randn(2, 16, 8, 12, generator=generator) for _ in range(2))
    guided = FAMILY.guide(negative, positive, 4.0)
    plain = negative + 4 * (positive - negative)
    tokens = pack_2x2(guided)
    torch.testing.assert_close(tokens.norm(dim=-1), pack_2x2(positive).norm(dim=-1))
    assert float(torch.cosine_similarity(tokens, pack_2x2(plain), dim=-1).min()) > 1 - 1e-5
    assert float((guided - plain).abs().max()) > 1
    torch.testing.assert_close(FAMILY.guide(negative, positive, 1.0), positive)


def test_padding_changes_neither_scores_nor_predictions() -> None:
    setup = Setup.of(ROW)
    reward = LatentReward.from_config(setup.reward_config(), pipeline=setup.pipeline).eval()
    given = setup.conditioning
    assert given.prompt_embeds_mask is not None
    assert given.prompt_embeds_mask.sum(dim=1).tolist() == [6, 16]
    noise = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    padded = Conditioning(
        torch.cat([given.prompt_embeds, noise], dim=1),
        prompt_embeds_mask=torch.cat([given.prompt_embeds_mask, torch.zeros(2, 7, dtype=torch.bool)], dim=1),
    )
    scores, same = (
        reward(setup.latents, prompt_embeds=c.prompt_embeds, prompt_embeds_mask=c.prompt_embeds_mask, seed=0)
        for c in (given, padded)
    )
    torch.testing.assert_close(same, scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(reward(setup.latents, PROMPTS, seed=0), scores, rtol=0, atol=1e-6)
    read = reward(setup.latents, prompt_embeds=padded.prompt_embeds, seed=0)
    assert float((read - scores).abs().max()) > 1e-4
    with torch.no_grad():
        prediction, padded_prediction = (setup.predict(conditioning=c) for c in (given, padded))
    torch.testing.assert_close(padded_prediction, prediction, rtol=0, atol=1e-5)


def test_prompts_are_cut_where_the_pipeline_cuts_them(pipeline: Any) -> None:
    conditioning = FAMILY.encode_prompts(pipeline, ["x" * 600, "x"])
    assert conditioning.prompt_embeds.shape == (2, 512, 32)
    assert conditioning.token_mask.sum(dim=1).tolist() == [512, 2]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_every_trained_weight_has_a_gradient(full: bool) -> None:
    setup = Setup.of(ROW)
    policy = Policy(setup.pipeline, rank=2, alpha=4, train_full_model=full)
    setup.predict(policy.denoiser).square().sum().backward()
    parameters = policy.trainable_parameters()
    assert [name for name, parameter in parameters.items() if parameter.grad is None] == []
    if full:  # of a fresh LoRA, one half has none
        assert [name for name, parameter in parameters.items() if not parameter.grad.any()] == []  # type: ignore[union-attr]
    assert any(name.startswith("transformer_blocks.3.attn.add_k_proj") for name in parameters)
    assert not any(name.startswith("transformer_blocks.3.attn.add_q_proj") for name in parameters)


@pytest.mark.parametrize("setting", ["guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_models_with_other_inputs_are_refused(setting: str) -> None:
    setup = Setup.of(ROW)
    changed = tiny_qwen_image_pipeline(**{setting: True}).transformer
    message = rf"has settings {{'{setting}': True}}.* qwen_image supports text-to-image models"
    with pytest.raises(ValueError, match=message):
        setup.backbone(changed)
    with pytest.raises(ValueError, match=message):
        setup.predict(changed)


def test_defaults_of_the_published_size() -> None:
    config = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128}
    assert FAMILY.reward_defaults(config) == RewardDefaults(30, (10, 20, 30), head_width=1536)
