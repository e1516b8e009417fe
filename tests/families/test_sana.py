"""Sana: what the pipeline tells its transformer, padding, the grid of the published solver, 32-fold compression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from dina_reward import LatentReward
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.families import Conditioning, get_family
from tests.families.row import Setup
from tests.families.rows.sana import ROW, tiny_sana_pipeline


FAMILY = get_family("sana")
CPU = torch.device("cpu")
TAPS: dict[str, Any] = {"num_layers": 2, "visual_taps": (2,), "text_taps": (1,)}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_sana_pipeline()


def solver(**settings: Any) -> Any:
    """Scheduler with the published settings."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, **settings
    )


def test_prompts_are_what_the_pipeline_gives_to_its_transformer_by_default(pipeline: Any) -> None:
    """Also the default length of 300 tokens; only the positive prompt gets the instruction."""
    seen: list[dict[str, Any]] = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(arguments), with_kwargs=True
    )
    pipeline("A cat.", height=64, width=96, num_inference_steps=1, use_resolution_binning=False, output_type="latent")
    handle.remove()
    negative, positive = FAMILY.encode_negative(pipeline), FAMILY.encode_prompts(pipeline, ["A cat."])
    text = torch.cat([negative.prompt_embeds, positive.prompt_embeds])
    mask = torch.cat([negative.token_mask, positive.token_mask])
    assert text.shape == (2, 300, 24)
    assert mask.sum(dim=1).tolist() == [1, 1 + 6 + 1]  # <bos>, and before the prompt the instruction's last token
    assert torch.equal(seen[0]["encoder_attention_mask"].bool(), mask)
    torch.testing.assert_close(seen[0]["encoder_hidden_states"][mask], text[mask], rtol=0, atol=1e-6)
    bare = FAMILY.encode_prompts(pipeline, [""])
    assert float((bare.prompt_embeds[0, 1] - positive.prompt_embeds[0, 1]).abs().max()) < 1e-5
    assert bare.token_mask.sum() == 2  # a positive prompt that happens to be empty keeps its instruction


def test_timesteps_are_scaled_as_by_the_pipeline(pipeline: Any) -> None:
    setup, seen = Setup.of(ROW), []
    handle = setup.denoiser.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(arguments["timestep"]), with_kwargs=True
    )
    setup.predict()
    handle.remove()
    assert seen[0].tolist() == [125.0, 400.0]
    backbone = setup.backbone()
    temb = setup.denoiser.time_embed(torch.tensor([125.0, 400.0]), batch_size=2, hidden_dtype=torch.float32)[1]
    features = backbone(setup.latents, setup.timestep, setup.conditioning)
    torch.testing.assert_close(features.temb, temb, rtol=0, atol=1e-6)


def test_padding_and_what_it_holds_do_not_change_scores() -> None:
    setup = Setup.of(ROW)
    reward = LatentReward.from_config(setup.reward_config(), pipeline=setup.pipeline)
    with torch.no_grad():
        for name, parameter in reward.model.trainable_state().items():
            if "lora_B" in name:
                parameter.fill_(0.05)
    text, mask = setup.conditioning.prompt_embeds, setup.conditioning.token_mask
    assert mask.sum(dim=1).tolist() == [7, 16]

    def score(text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return reward(setup.latents, prompt_embeds=text, prompt_embeds_mask=mask, seed=0)

    scores = score(text, mask)
    longer = torch.cat([text, torch.full((2, 5, 24), 9.0)], dim=1)
    padded = torch.cat([mask, torch.zeros(2, 5, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(score(longer, padded), scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(score(torch.where(mask[..., None], text, 9.0), mask), scores, rtol=0, atol=1e-5)
    assert float((score(text, torch.ones_like(mask)) - scores)[0].abs()) > 1e-5


@pytest.mark.parametrize("steps", [4, 20])
def test_grid_is_the_published_solvers_own(steps: int) -> None:
    policy = Policy(tiny_sana_pipeline(scheduler=solver()), rank=2, alpha=4)
    sampler, own = policy.sampler(steps, (32, 2, 3)), solver()
    own.set_timesteps(steps)
    even = torch.linspace(0.999, 0, steps + 1)
    torch.testing.assert_close(sampler.levels, 3 * even / (1 + 2 * even), rtol=0, atol=1e-6)
    torch.testing.assert_close(sampler.levels, own.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(sampler.timesteps, own.timesteps.float(), rtol=0, atol=1.0)
    process = FAMILY.noise_process(policy.pipeline.scheduler.config)
    assert float(process.snap(0.5).level) == pytest.approx(0.5, abs=1e-3)
    assert float(process.snap(0.5).timestep) == pytest.approx(500, abs=1)


def test_rollout_equals_a_pipeline_with_the_solver_of_first_order() -> None:
    """Of first order, DPM-Solver++ takes Euler steps."""
    pipeline, noise = tiny_sana_pipeline(scheduler=solver(solver_order=1)), torch.randn(1, 32, 2, 3)
    expected = pipeline(
        "a cat", height=64, width=96, latents=noise, num_inference_steps=4, output_type="latent", **ROW.guided[1]
    ).images
    policy = Policy(pipeline, rank=2, alpha=4, guidance_scale=ROW.guided[0], max_sequence_length=16)
    bound = policy.bind(policy.encode(["a cat"], CPU), policy.encode_negative(CPU))
    latents = sample(bound, noise, policy.sampler(4, noise.shape[1:])).latents
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_images_are_compressed_by_32(pipeline: Any) -> None:
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    latents = FAMILY.encode_images(pipeline, [image])
    pixels = pipeline.image_processor.preprocess([image], height=64, width=96)
    torch.testing.assert_close(latents, pipeline.vae.encode(pixels).latent * 0.41407)
    assert latents.shape == (1, 32, 2, 3)
    config = pipeline.transformer.config
    assert FAMILY.latent_shape(pipeline, 1024, 512, config) == (32, 32, 16)
    with pytest.raises(ValueError, match="72 x 64 must be divisible by 32"):
        FAMILY.latent_shape(pipeline, 72, 64, config)


@torch.no_grad()
def test_learned_variance_is_dropped_as_in_the_pipeline() -> None:
    """Models with twice the output channels."""
    pipeline = tiny_sana_pipeline(out_channels=64)
    conditioning = FAMILY.encode_prompts(pipeline, ["a cat"], max_sequence_length=16)
    latents, timestep = torch.randn(1, 32, 2, 3), torch.tensor([500.0])
    prediction = FAMILY.predict_velocity(pipeline.transformer, latents, timestep, conditioning)
    whole = pipeline.transformer(latents, conditioning.prompt_embeds, timestep * 0.5, None, conditioning.token_mask)
    assert torch.equal(prediction, whole.sample.chunk(2, dim=1)[0])


def test_distilled_models_and_other_text_are_refused(pipeline: Any) -> None:
    sprint = tiny_sana_pipeline(guidance_embeds=True)
    with pytest.raises(ValueError, match="guidance_embeds=True: Sana-Sprint"):
        FAMILY.build_backbone(sprint.transformer, **TAPS)
    with pytest.raises(ValueError, match="guidance_embeds=True: Sana-Sprint"):
        Policy(sprint, rank=2, alpha=4)
    with pytest.raises(ValueError, match=r"takes \(batch, length, 24\)"):
        FAMILY.check_conditioning(Conditioning(torch.zeros(1, 4, 32)), pipeline.transformer.config)


def test_defaults_of_the_published_size_and_signature(pipeline: Any) -> None:
    published = {"num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32}
    defaults = FAMILY.reward_defaults(published)
    assert (defaults.num_layers, defaults.taps, defaults.head_width) == (10, (3, 7, 10), 1536)
    assert not defaults.published
    config = pipeline.transformer.config
    for key in ("timestep_scale", "qk_norm", "interpolation_scale"):
        assert FAMILY.backbone_signature(config, 2) != FAMILY.backbone_signature({**config, key: None}, 2)
