"""diffusers: a callback while a pipeline samples, and scripts that have modules and no pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.integrations import ScoreCallback, prompt_seeds
from tests.integrations.conftest import agree
from tests.test_reward import make_reward
from tests.tiny_models import tiny_sd3_pipeline


PROMPTS = ["a cat", "a dog"]
SIZE = {"height": 64, "width": 64, "max_sequence_length": 16, "guidance_scale": 1.0, "output_type": "latent"}


def sample(pipe: Any, callback: Any, steps: int = 4) -> Tensor:
    latents: Tensor = pipe(
        PROMPTS, num_inference_steps=steps, generator=torch.manual_seed(0), callback_on_step_end=callback, **SIZE
    ).images
    return latents


def test_states_are_scored_at_the_next_timestep(sd3_pipeline: Any, reward: LatentReward) -> None:
    states: list[Tensor] = []
    scores = ScoreCallback(reward, PROMPTS)

    def callback(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        states.append(kwargs["latents"].clone())
        return scores(pipe, step, timestep, kwargs)

    final = sample(sd3_pipeline, callback)
    assert sorted(scores.history) == [0, 1, 2, 3]
    for step in range(3):
        at = sd3_pipeline.scheduler.timesteps[step + 1]
        expected = reward.score_noisy(states[step], PROMPTS, timesteps=at)
        agree("diffusers, callback", scores.history[step], expected)
    assert torch.allclose(scores.history[3], reward(final, PROMPTS, seed=prompt_seeds(PROMPTS)), atol=1e-5)


def test_some_steps_and_an_early_end(sd3_pipeline: Any, reward: LatentReward) -> None:
    scores = ScoreCallback(reward, PROMPTS, steps={1, 3}, stop=lambda step, scores: step == 1)
    sample(sd3_pipeline, scores)
    assert list(scores.history) == [1]
    assert sd3_pipeline.interrupt


def test_what_cannot_be_scored_is_said(reward: LatentReward) -> None:
    class Heun:
        order = 2

    with pytest.raises(ValueError, match="name them in callback_on_step_end_tensor_inputs"):
        ScoreCallback(reward, "x")(None, 0, None, {})
    pipe = type("Pipe", (), {"scheduler": Heun()})()
    with pytest.raises(ValueError, match="Heun takes several calls per step"):
        ScoreCallback(reward, "x")(pipe, 0, None, {"latents": torch.zeros(1, 16, 8, 8)})


def test_modules_without_a_pipeline(tmp_path: Path) -> None:
    """What a diffusers training script has: its own modules, and embeddings that it has encoded."""
    pipe = tiny_sd3_pipeline()
    reward = make_reward(pipe)
    reward.save_pretrained(tmp_path / "reward")
    modules = {"transformer": pipe.transformer, "scheduler": pipe.scheduler}
    alone = LatentReward.from_pretrained(tmp_path / "reward", **modules, share_backbone=True)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds, _, pooled, _ = pipe.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=16
    )
    scores = alone(latents, prompt_embeds=embeds, pooled_prompt_embeds=pooled, seed=0)
    agree("diffusers, modules", scores, reward(latents, PROMPTS, seed=0))
    with pytest.raises(ValueError, match="this reward has no text encoders"):
        alone(latents, PROMPTS, seed=0)
