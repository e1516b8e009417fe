import pytest
import torch

from dina_reward.shapes.autoencoder import measure_latents, new_autoencoder
from dina_reward.shapes.generator import (
    CORRUPTION,
    Cycle,
    corrupt_captions,
    encode_prompts,
    predict_velocity,
    sample_latents,
    train_generator,
)
from dina_reward.shapes.prompts import ATTRIBUTES, Scene, sample_prompts, sample_scenes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene_indices(count):
    return torch.tensor([scene.indices for scene in sample_scenes(count, "train", seed=0)])


def test_corruption_keeps_the_stated_share_and_never_makes_held_out_scenes():
    scenes = scene_indices(6000)
    heard = corrupt_captions(scenes, CORRUPTION, generator())
    assert not any(Scene.from_indices(row).held_out for row in heard.tolist())
    right = (heard == scenes).float().mean(dim=0)
    expected = torch.tensor([1 - CORRUPTION + CORRUPTION / len(values) for values in ATTRIBUTES.values()])
    torch.testing.assert_close(right, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("corruption", [0.0, 1.0])
def test_corruption_at_its_ends(corruption):
    scenes = scene_indices(2000)
    heard = corrupt_captions(scenes, corruption, generator())
    share = (heard == scenes).float().mean().item()
    assert share == 1.0 if corruption == 0 else share == pytest.approx(0.3125, abs=0.03)


def test_sampling_is_seeded(shapes_pipeline):
    prompts = sample_prompts(4, seed=0)
    for eta in (0.0, 0.8):
        first, again, other = (sample_latents(shapes_pipeline, prompts, generator(s), eta=eta) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_sampling_without_fresh_noise_is_the_pipelines_own_sampler(shapes_pipeline):
    prompts = sample_prompts(4, seed=0)
    noise = torch.randn(4, 8, 8, 8, generator=generator(3))
    shapes_pipeline.set_progress_bar_config(disable=True)
    expected = shapes_pipeline(
        prompts,
        height=32,
        width=32,
        latents=noise,
        num_inference_steps=10,
        guidance_scale=1.0,
        max_sequence_length=6,
        output_type="latent",
    ).images
    torch.testing.assert_close(sample_latents(shapes_pipeline, prompts, generator(3)), expected, rtol=0, atol=1e-3)


def test_prompts_are_encoded_in_order(shapes_pipeline):
    prompts = sample_prompts(3, seed=0)
    twice = encode_prompts(shapes_pipeline, [*prompts, *prompts[::-1]])
    assert torch.equal(twice.prompt_embeds[:3], twice.prompt_embeds[3:].flip(0))
    assert twice.prompt_embeds.shape == (6, 12, 128)
    assert twice.pooled_prompt_embeds.shape == (6, 128)


def test_longer_padding_hardly_changes_the_prediction(shapes_pipeline):
    prompts = sample_prompts(16, seed=0)
    x, sigma = torch.randn(16, 8, 8, 8, generator=generator()), torch.full((16,), 0.7)
    text = encode_prompts(shapes_pipeline, prompts)
    padded = torch.nn.functional.pad(text.prompt_embeds, (0, 0, 0, 250))
    velocity = predict_velocity(shapes_pipeline.transformer, x, sigma, text)
    longer = predict_velocity(shapes_pipeline.transformer, x, sigma, type(text)(padded, text.pooled_prompt_embeds))
    assert (longer - velocity).square().mean() < 0.05 * velocity.square().mean()


def test_training_is_reproducible():
    vae = measure_latents(new_autoencoder().eval(), generator(), count=16)
    first, again = (
        train_generator(vae, cycles=[Cycle(1), Cycle(1, jitter=0.5)], batch_size=4, num_images=8, seed=1)
        for _ in range(2)
    )
    for parameter, same in zip(first.transformer.parameters(), again.transformer.parameters(), strict=True):
        assert torch.equal(parameter, same)
