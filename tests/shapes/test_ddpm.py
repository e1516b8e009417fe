import pytest
import torch

from dina_reward.shapes.autoencoder import encode_images, measure_latents, new_autoencoder
from dina_reward.shapes.ddpm import encode_prompts, new_ddpm_pipeline, sample_ddim_latents, train_ddpm_generator
from dina_reward.shapes.generator import Cycle
from dina_reward.shapes.prompts import sample_prompts, sample_scenes
from dina_reward.shapes.renderer import render
from dina_reward.shapes.shipped import load_pipeline
from dina_reward.shapes.worlds import WORLDS, get_world, world_of


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline("ddpm")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_is_the_pipelines_own_and_seeded(pipeline, eta):
    prompts = sample_prompts(3, seed=0)
    latents = sample_ddim_latents(pipeline, prompts, generator(4), num_inference_steps=5, eta=eta)
    again, other = (
        sample_ddim_latents(pipeline, prompts, generator(s), num_inference_steps=5, eta=eta) for s in (4, 5)
    )
    assert torch.equal(latents, again)
    assert not torch.equal(latents, other)
    draws = generator(4)
    expected = pipeline(
        prompts,
        latents=torch.randn(3, 8, 8, 8, generator=draws),
        generator=draws,
        num_inference_steps=5,
        guidance_scale=1.0,
        eta=eta,
        output_type="latent",
    ).images
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


def test_prompts_are_encoded_in_order(pipeline):
    prompts = sample_prompts(3, seed=0)
    twice = encode_prompts(pipeline, [*prompts, *prompts[::-1]])
    assert torch.equal(twice[:3], twice[3:].flip(0))
    assert twice.shape == (6, 6, 64)


def test_latents_have_no_shift():
    vae = measure_latents(new_autoencoder().eval(), generator(), count=16)
    pipeline = new_ddpm_pipeline(vae)
    assert pipeline.vae.config.shift_factor is None
    images = render(sample_scenes(4, "train", seed=0), generator())
    shift = vae.config.shift_factor * vae.config.scaling_factor
    torch.testing.assert_close(encode_images(pipeline.vae, images), encode_images(vae, images) + shift)


def test_training_is_reproducible():
    vae = measure_latents(new_autoencoder().eval(), generator(), count=16)
    first, again = (
        train_ddpm_generator(vae, cycles=[Cycle(1), Cycle(1, jitter=0.5)], batch_size=4, num_images=8, seed=1)
        for _ in range(2)
    )
    untrained = new_ddpm_pipeline(vae, seed=1)
    for parameter, same in zip(first.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(parameter, same)
    assert not torch.equal(first.unet.conv_in.weight, untrained.unet.conv_in.weight)


def test_worlds_are_found_by_name_and_pipeline(pipeline, shapes_pipeline):
    assert world_of(pipeline) is get_world("ddpm") is WORLDS[1]
    assert world_of(shapes_pipeline) is get_world("flow")
    assert get_world("ddpm").reward_config().family == "stable_diffusion"
    with pytest.raises(ValueError, match="No world called 'pixel'"):
        get_world("pixel")
    with pytest.raises(ValueError, match="Linear is not a generator of the shapes world"):
        world_of(torch.nn.Linear(1, 1))
