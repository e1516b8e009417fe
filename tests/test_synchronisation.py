"""On a GPU nothing waits between launches: the host reads a batch's scores once, and nothing while sampling or training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dina_reward import LatentReward
from dina_reward.alignment import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
)
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.shapes.shipped import load_pipeline, load_reward
from tests.alignment.tiny_policy import tiny_pipeline
from tests.alignment.trainers.forward_helpers import PROMPTS, closeness, forward_settings
from tests.synchronisation import Synchronisations


PROMPT = "a small red circle on a white background"
LATENTS = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def tensors(*modules: nn.Module) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = load_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def shared(pipeline: Any) -> LatentReward:
    return load_reward("flow", pipeline=pipeline, share_backbone=True)


def test_reads_are_seen() -> None:
    model = nn.Linear(2, 2)
    with Synchronisations(tensors(model)) as seen:
        output = model(torch.ones(1, 2))
        assert bool(torch.tensor([1.0]).isfinite().all())  # of the host's own
        assert not seen.places
        assert bool(output.isfinite().all())
        assert output[output.isfinite()].shape == (2,)
        assert len(output.tolist()) == 1
        output.flatten()[0].item()
    assert len(seen.places) == 4


def test_scores_are_read_once(pipeline: Any, shared: LatentReward) -> None:
    shared(LATENTS, PROMPT, seed=0)  # encodes the prompt, and looks at what only a first call looks at
    roots = [LATENTS, *tensors(pipeline.transformer, shared.model)]
    with Synchronisations(roots) as seen:
        shared(LATENTS, PROMPT, seed=0, noise_level=[0.2, 0.4], num_noise_samples=2, kappa=1.0)
    assert seen.count == 1, seen.places
    with Synchronisations(roots) as seen:
        shared.score_noisy(LATENTS, PROMPT, noise_level=0.4)
    assert seen.count == 1, seen.places


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "grpo": (
        DiffusionGRPOTrainer,
        DiffusionGRPOConfig,
        {"beta": 0.1, "sde_window_size": 1, "sde_window_range": [0, 2]},
    ),
    "nft": (DiffusionNFTTrainer, DiffusionNFTConfig, {"beta_kl": 0.1}),
    "dpo": (OnlineDPOTrainer, OnlineDPOConfig, {"loss_type": "soft"}),
}


@pytest.mark.parametrize("name", CASES)
def test_sampling_and_training_wait_for_nothing(tmp_path: Path, name: str) -> None:
    trainer_class, config_class, options = CASES[name]
    settings = forward_settings(tmp_path, **options)
    known = {key: value for key, value in settings.items() if key in config_class.__dataclass_fields__}
    trainer = trainer_class(tiny_pipeline(), closeness, config_class(**known), PROMPTS)
    maker = trainer.experience_maker
    weights = list(tensors(trainer.policy.denoiser))
    conditioning, _, index = maker.encode(0, range(8))
    noise = maker.initial_latents(0, range(8))
    with Synchronisations([*weights, noise]) as seen:
        sample(trainer.policy.bind(conditioning[index], None), noise, trainer.sampler)
    assert not seen.places
    part = trainer.make_experience(0)[0][0]
    recorded = [*part.rollout.states.values(), *part.rollout.log_probs.values(), part.rewards, part.advantages]
    with Synchronisations([*weights, part.rollout.latents, *recorded]) as seen:
        trainer.step_loss(trainer.model, part, 0).loss.backward()
    assert not seen.places
