"""The pixel reward: what it takes and gives, its files, and that it learns from pairs."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward.alignment.experience.rewards import RewardSet
from dina_reward.likelihood import ThurstoneModel
from dina_reward.reward_functions import takes_images
from dina_reward.shapes import pixel_reward
from dina_reward.shapes.autoencoder import decode_latents, encode_images
from dina_reward.shapes.pixel_reward import (
    PixelReward,
    PixelRewardConfig,
    calibrate_pixel_reward,
    score_pairs,
    train_pixel_reward,
)
from dina_reward.shapes.preferences import LABEL_NOISE, PreferencePairs
from dina_reward.shapes.prompts import all_scenes, sample_prompts, sample_scenes
from dina_reward.shapes.renderer import render
from dina_reward.shapes.reward import train_reward


SMALL = {"widths": (16, 16, 32), "blocks": (0, 1), "text_size": 32}
PROMPTS = sample_prompts(6, "held_out", seed=0)


@pytest.fixture(scope="module")
def reward(shapes_pipeline: Any) -> PixelReward:
    return PixelReward.new(shapes_pipeline, seed=0, **SMALL)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return render(sample_scenes(6, "held_out", seed=1), torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def easy_pairs(shapes_pipeline: Any) -> PreferencePairs:
    """Renders of training scenes; the captions' backgrounds tell the two sides apart, and nothing else has to."""
    scenes = all_scenes("train")
    latents = encode_images(shapes_pipeline.vae, render(scenes, torch.Generator().manual_seed(0)))
    indices = torch.tensor([scene.indices for scene in scenes])
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randint(len(scenes), (2, 4000), generator=generator)
    differ = indices[first, 3] != indices[second, 3]
    first, second = first[differ], second[differ]
    return PreferencePairs(
        latents=latents,
        chosen=first,
        rejected=second,
        scenes=indices[first],
        gap=torch.full((len(first),), 0.5),
        source=torch.zeros(len(scenes), dtype=torch.long),
        indices=indices,
        cleanness=torch.ones(len(scenes)),
    )


def test_scores_are_float32_and_do_not_depend_on_the_batch_split(reward: PixelReward, images: torch.Tensor) -> None:
    whole = reward(images.double(), PROMPTS)
    assert whole.shape == (6,)
    assert whole.dtype == torch.float32
    assert whole.std() > 1e-3
    parts = [reward(image[None], [prompt]) for image, prompt in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


def test_image_and_caption_both_count(reward: PixelReward, images: torch.Tensor) -> None:
    whole = reward(images, PROMPTS)
    assert (reward(images, PROMPTS[1:] + PROMPTS[:1]) - whole).abs().min() > 1e-5
    assert (reward(images.flip(0), PROMPTS) - whole).abs().min() > 1e-5


def test_gradients_reach_images_and_every_parameter(reward: PixelReward, images: torch.Tensor) -> None:
    pixels = images.clone().requires_grad_()
    reward.model.zero_grad()
    reward(pixels, PROMPTS).sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.flatten(1).abs().sum(dim=1) > 0).all()
    missing = [name for name, p in reward.model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert missing == []


def test_the_trainers_decode_for_it(shapes_pipeline: Any, reward: PixelReward, images: torch.Tensor) -> None:
    assert takes_images(reward)
    latents = encode_images(shapes_pipeline.vae, images)
    decoded = decode_latents(shapes_pipeline.vae, latents)
    rewards = RewardSet([reward], {"noise_level": [0.4]}, decode=lambda z: decode_latents(shapes_pipeline.vae, z))
    conditioning, index = reward.prompt_encoder(PROMPTS)
    scores = rewards.score(latents, [{"prompt": prompt} for prompt in PROMPTS], conditioning[index], [0] * 6)
    torch.testing.assert_close(scores[:, 0], reward(decoded, PROMPTS).detach(), atol=1e-5, rtol=0)


def test_seed_reaches_the_weights_and_nothing_else(shapes_pipeline: Any, reward: PixelReward) -> None:
    state = torch.random.get_rng_state()
    same, other = (PixelReward.new(shapes_pipeline, seed=seed, **SMALL) for seed in (0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [each.model.state_dict()["conv_in.weight"] for each in (reward, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_save_and_load(shapes_pipeline: Any, reward: PixelReward, images: torch.Tensor, tmp_path: Path) -> None:
    kept = PixelReward(reward.model, replace(reward.config, variance_offset=0.31), shapes_pipeline)
    kept.save_pretrained(tmp_path / "reward")
    assert sorted(path.name for path in (tmp_path / "reward").iterdir()) == ["config.json", "model.safetensors"]
    loaded = PixelReward.from_pretrained(tmp_path / "reward", shapes_pipeline)
    assert loaded.config == kept.config
    assert loaded.preference_model == ThurstoneModel(0.0, 0.31)
    assert torch.equal(loaded(images, PROMPTS), reward(images, PROMPTS))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        PixelReward.from_pretrained(tmp_path, shapes_pipeline)


def test_it_is_about_as_large_as_the_latent_reward(shapes_pipeline: Any) -> None:
    from dina_reward.shapes import load_reward

    latent = load_reward(pipeline=shapes_pipeline, share_backbone=True)
    size = sum(parameter.numel() for parameter in latent.model.parameters())
    assert PixelReward.new(shapes_pipeline).num_parameters == pytest.approx(size, rel=0.1)


def test_wrong_inputs_are_refused(reward: PixelReward, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"shape \(6, 3, 16, 32\) for 6 prompts; expected \(batch, 3, 32, 32\)"):
        reward(images[:, :, ::2], PROMPTS)
    with pytest.raises(ValueError, match="for 5 prompts"):
        reward(images, PROMPTS[:5])
    with pytest.raises(ValueError, match="NaN or infinite"):
        reward(images * torch.nan, PROMPTS)
    with pytest.raises(ValueError, match="expected multiples of 8"):
        PixelRewardConfig(64, widths=(12, 16, 16), blocks=(0, 0))
    with pytest.raises(ValueError, match="a number of blocks for every width but the first"):
        PixelRewardConfig(64, widths=(16, 16), blocks=(0, 0))


@pytest.mark.slow
def test_it_learns_what_tells_easy_pairs_apart(
    shapes_pipeline: Any, easy_pairs: PreferencePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 60, "batch_size": 32, "learning_rate": 3e-3, "ema_decay": 0.9, **SMALL}
    trained = train_pixel_reward(shapes_pipeline, easy_pairs, tmp_path / "one", **settings)
    test = replace(easy_pairs, **{n: getattr(easy_pairs, n)[:400] for n in ("chosen", "rejected", "scenes", "gap")})
    untrained = score_pairs(PixelReward.new(shapes_pipeline, seed=0, **SMALL), test, shapes_pipeline)
    margins = score_pairs(trained, test, shapes_pipeline, batch_size=64)
    assert float((untrained > 0).float().mean()) < 0.7
    assert float((margins > 0).float().mean()) > 0.85
    monkeypatch.setattr(pixel_reward, "_PixelRewardTrainer", None)  # finished, so that it is not trained again
    again = train_pixel_reward(shapes_pipeline, easy_pairs, tmp_path / "one", **settings)
    assert torch.equal(score_pairs(again, test, shapes_pipeline, batch_size=64), margins)


def test_calibration_finds_the_variance_that_made_the_labels(
    shapes_pipeline: Any, reward: PixelReward, easy_pairs: PreferencePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    margins = torch.randn(len(easy_pairs), generator=torch.Generator().manual_seed(0))
    truth = ThurstoneModel(0.0, 0.7).probability(margins, torch.zeros_like(margins), torch.tensor(0.0))
    gap = LABEL_NOISE * torch.special.ndtri(truth)  # what the labeller needs for these probabilities
    monkeypatch.setattr(pixel_reward, "score_pairs", lambda *_: margins)
    kept = PixelReward(reward.model, reward.config, shapes_pipeline)
    found = calibrate_pixel_reward(kept, replace(easy_pairs, gap=gap), shapes_pipeline)
    assert found.variance_offset == pytest.approx(0.7, rel=0.03)
    assert kept.config.variance_offset == found.variance_offset


def test_the_budget_is_that_of_the_latent_reward() -> None:
    latent, pixel = (inspect.signature(function).parameters for function in (train_reward, train_pixel_reward))
    for name in ("steps", "batch_size"):  # each learns at the rate that suits it
        assert pixel[name].default == latent[name].default
