import torch

from dina_reward.shapes.autoencoder import (
    decode_latents,
    encode_images,
    reconstruction_psnr,
    sample_images,
    train_autoencoder,
)
from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.prompts import all_scenes
from dina_reward.shapes.renderer import render


def test_shipped_autoencoder_reconstructs_held_out_renders(shapes_pipeline):
    scenes = all_scenes("held_out") * 2
    images = render(scenes, torch.Generator().manual_seed(0))
    assert reconstruction_psnr(shapes_pipeline.vae, images) >= 28
    decoded = decode_latents(shapes_pipeline.vae, encode_images(shapes_pipeline.vae, images))
    scores = Oracle()(decoded, scenes)
    assert scores.fit.mean() >= 0.97
    assert scores.cleanness.mean() >= 0.8


def test_scaled_latents_are_standardised(shapes_pipeline):
    latents = encode_images(shapes_pipeline.vae, render(all_scenes(), torch.Generator().manual_seed(0)))
    assert latents.shape == (144, 8, 8, 8)
    assert abs(latents.mean()) < 0.05
    assert abs(latents.std() - 1) < 0.05


def test_results_do_not_depend_on_the_batch_size(shapes_pipeline):
    images = render(all_scenes("held_out"), torch.Generator().manual_seed(0))[:10]
    latents = encode_images(shapes_pipeline.vae, images)
    torch.testing.assert_close(encode_images(shapes_pipeline.vae, images, batch_size=3), latents, rtol=0, atol=1e-4)
    decoded = decode_latents(shapes_pipeline.vae, latents)
    torch.testing.assert_close(decode_latents(shapes_pipeline.vae, latents, batch_size=3), decoded, rtol=0, atol=1e-4)


def test_training_images_are_seeded_and_partly_degraded():
    first, again = (sample_images(20, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again)
    cleanness = Oracle().read(first).cleanness
    assert (cleanness < 0.97).sum() <= 8
    assert (cleanness[8:] > 0.85).all()


def test_training_is_reproducible_and_measures_its_latents():
    first, again = (train_autoencoder(steps=3, batch_size=4, seed=1) for _ in range(2))
    for parameter, same in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, same)
    latents = encode_images(first, render(all_scenes(), torch.Generator().manual_seed(0)))
    assert abs(latents.mean()) < 0.1
    assert abs(latents.std() - 1) < 0.1
