"""Subjects of random weights at the size of a model that is only known by its configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dina_reward.backbones.structures import ModelStructure
from dina_reward.bench import loaded_subject, random_subject
from tests.tiny_models import tiny_sd3_pipeline


@pytest.fixture(scope="module")
def structure() -> ModelStructure:
    pipeline: Any = tiny_sd3_pipeline()
    plain = {
        part: {k: v for k, v in getattr(pipeline, part).config.items() if k[0] != "_"}
        for part in ("transformer", "vae")
    }
    return ModelStructure(
        name="tiny",
        pipeline_class="StableDiffusion3Pipeline",
        denoiser_class="SD3Transformer2DModel",
        denoiser_config=plain["transformer"],
        vae_class="AutoencoderKL",
        vae_config=plain["vae"],
        scheduler_class="FlowMatchEulerDiscreteScheduler",
        text_tokens=9,
    )


def test_random_weights_are_made_in_their_dtype_from_a_seed(structure: ModelStructure) -> None:
    first, again, other = (
        random_subject(structure, device=torch.device("cpu"), dtype=torch.bfloat16, seed=seed) for seed in (0, 0, 1)
    )
    assert {p.dtype for p in first.denoiser.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() is torch.float32
    one, same, another = (next(s.denoiser.parameters()) for s in (first, again, other))
    assert torch.equal(one, same)
    assert not torch.equal(one, another)
    assert first.conditioning(3).prompt_embeds.shape[:2] == (3, 9)
    assert first.latents(2).shape == (2, *first.latent_shape)


def test_a_model_that_does_not_fit_is_refused(structure: ModelStructure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dina_reward.bench.subject.free_memory", lambda device: 1000)
    with pytest.raises(
        ValueError, match=r"tiny in torch.float32 takes .* GiB of weights, and 0.0 GiB are free on cpu"
    ):
        random_subject(structure, device=torch.device("cpu"), dtype=torch.float32)


def test_the_size_of_the_images_decides_that_of_the_latents(structure: ModelStructure) -> None:
    wide = loaded_subject(tiny_sd3_pipeline(), "tiny", height=16, width=32)
    assert wide.latent_shape == (16, 2, 4)
    sized = dataclasses.replace(structure, height=48, width=32)
    made = random_subject(sized, device=torch.device("cpu"), dtype=torch.float32)
    assert (made.height, made.width, made.latent_shape) == (48, 32, (16, 6, 4))
