"""Early selection in a pipeline's own call: the batch shrinks, and the survivors are what they would have been."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

from dina_reward.search import SearchCallback
from dina_reward.shapes import load_pipeline
from dina_reward.shapes.shipped import load_reward
from tests.search.helpers import closeness, tiny


PROMPTS = ["a cat"] * 4 + ["a dog"] * 4


def call(pipeline: Any, callback: SearchCallback | None = None, **options: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 5, "max_sequence_length": 8}
    hooks: dict[str, Any] = {}
    if callback is not None:
        inputs = callback.tensor_inputs(pipeline)
        hooks = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": inputs}
    latents = torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(PROMPTS, latents=latents, output_type="latent", **{**arguments, **hooks, **options})
    result: torch.Tensor = output.images
    return result


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_batch_shrinks_to_the_best_of_each_prompt(guidance_scale: float) -> None:
    pipeline, reward = tiny()
    whole = call(pipeline, guidance_scale=guidance_scale)
    callback = SearchCallback(reward, PROMPTS, checks=(0.4, 0.6))
    survivors = call(pipeline, callback, guidance_scale=guidance_scale)
    assert survivors.shape == (2, 16, 4, 4)
    assert [row // 4 for row in callback.rows] == [0, 1]
    torch.testing.assert_close(survivors, whole[callback.rows], rtol=1e-4, atol=1e-4)
    first, second = callback.trace
    for rows in (slice(0, 4), slice(4, 8)):
        kept = [row for row in first.kept if rows.start <= row < rows.stop]
        assert sorted(first.scores[kept].tolist()) == sorted(first.scores[rows].topk(2).values.tolist())
    assert len(second.prompt) == 4
    evaluations = 2 if guidance_scale > 1 else 1
    assert callback.calls.rollout == evaluations * (8 * 2 + 4 + 2 * 2)
    assert callback.calls.reward == 8 + 4
    torch.testing.assert_close(callback.select(survivors), survivors)


def test_states_are_scored_at_the_level_that_follows_the_step() -> None:
    pipeline, reward = tiny()
    callback = SearchCallback(reward, PROMPTS, checks=(0.4,), shrink=False)
    seen: list[torch.Tensor] = []

    def both(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"].clone())
        return callback(pipe, step, timestep, values)

    latents = call(pipeline, None, callback_on_step_end=both, guidance_scale=1.0)
    assert len(latents) == 8
    level = float(pipeline.scheduler.sigmas[2])
    torch.testing.assert_close(callback.trace[0].scores, reward.score_noisy(seen[1], PROMPTS, noise_level=level))
    assert callback.trace[0].noise_level == pytest.approx(level, abs=1e-3)
    best = callback.select(latents)
    assert best.shape == (2, 16, 4, 4)
    assert len(callback.rows) == 4


def test_ddpm_pipelines_shrink_too() -> None:
    pipeline = load_pipeline("ddpm")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    callback = SearchCallback(load_reward("ddpm", pipeline=pipeline, share_backbone=True), PROMPTS)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=2.0,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=callback.tensor_inputs(pipeline),
    ).images
    assert len(result) == 2
    assert [len(check.prompt) for check in callback.trace] == [8, 4]


def test_what_cannot_shrink_is_said() -> None:
    pipeline, reward = tiny()
    other = SimpleNamespace(scheduler=pipeline.scheduler)
    assert SearchCallback(reward, PROMPTS).tensor_inputs(other) == ["latents"]
    with pytest.raises(ValueError, match="SimpleNamespace keeps rows that its callback cannot change"):
        SearchCallback(reward, PROMPTS, shrink=True).tensor_inputs(other)

    class StableDiffusionPipeline(SimpleNamespace):
        pass

    solver = StableDiffusionPipeline(scheduler=DPMSolverMultistepScheduler())
    assert SearchCallback(reward, PROMPTS).tensor_inputs(solver) == ["latents"]
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler remembers the rows of earlier steps"):
        SearchCallback(reward, PROMPTS, shrink=True).tensor_inputs(solver)


def test_wrong_input() -> None:
    pipeline, reward = tiny()
    with pytest.raises(ValueError, match="closeness cannot score a noisy state"):
        SearchCallback(closeness, PROMPTS)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="the pipeline has 8 rows and 2 are expected of 2 prompts; give one prompt per row"
    ):
        call(pipeline, SearchCallback(reward, ["a cat", "a dog"]))
    with pytest.raises(ValueError, match="reward_weights has 2 entries for 1"):
        SearchCallback(reward, PROMPTS, reward_weights=[1.0, 2.0])
