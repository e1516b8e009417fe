"""Training on what search finds: which samples, which weights, and that it helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward.search import SearchDistillationConfig, SearchDistillationTrainer
from tests.alignment.helpers import PROMPTS, closeness, tiny_config, tiny_pipeline


def trainer(output: Path, **overrides: Any) -> SearchDistillationTrainer:
    known = SearchDistillationConfig.__dataclass_fields__
    config = tiny_config(
        output,
        cls=lambda **values: SearchDistillationConfig(**{key: value for key, value in values.items() if key in known}),
        **{"num_generations": 2, "per_device_train_batch_size": 4, "search_budget": 3, **overrides},
    )
    return SearchDistillationTrainer(tiny_pipeline(), closeness, config, PROMPTS)


def test_the_best_samples_of_each_prompt_are_trained_on(tmp_path: Path) -> None:
    made = trainer(tmp_path, search_method="best_of_n", num_train_timesteps=3)
    parts, metrics = made.make_experience(0)
    # Two chunks of two prompts, three samples each; five steps.
    assert made.policy.calls.rollout == 4 * 3 * 5
    assert made.policy.calls.reward == 4 * 3
    rewards = torch.cat([part.rewards for part in parts])
    assert metrics["reward"] == pytest.approx(float(rewards.mean()))
    for part in parts:
        torch.testing.assert_close(part.rewards, closeness(part.rollout.latents))
        assert part.prompts[0] == part.prompts[1] != part.prompts[2]
        assert bool((part.rewards[::2] >= part.rewards[1::2]).all())
        torch.testing.assert_close(part.weights, torch.ones(4))
    made.train()
    assert made.policy.calls.update == 2 * 4 * 3
    again = trainer(tmp_path / "again", search_method="best_of_n", num_train_timesteps=3).make_experience(0)[0]
    assert torch.equal(again[0].rollout.latents, parts[0].rollout.latents)


def test_weights_grow_with_the_reward(tmp_path: Path) -> None:
    made = trainer(tmp_path, weight_strength=2.0)
    weights = made._weights(torch.tensor([1.0, 0.0, 5.0, 5.0]), [0, 0, 1, 1])
    share = float(torch.tensor([2.0, 0.0]).softmax(dim=0)[0])
    torch.testing.assert_close(weights, torch.tensor([2 * share, 2 - 2 * share, 1.0, 1.0]))


def test_the_loss_is_the_weighted_denoising_error(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    (part, _), _ = made.make_experience(0)
    with torch.no_grad():
        output = made.step_loss(made.policy.denoiser, part, 0)
        noise, point = made.draw(part, [0], part.rows)
        level = point.level.view(-1, 1, 1, 1)
        noisy = (1 - level) * part.rollout.latents + level * noise
        velocity = made.policy.bind(part.conditioning_rows(), None)(noisy, point.timestep)
        expected = (velocity - (noise - part.rollout.latents)).square().mean()
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search_method": "beam"}, "unknown search_method 'beam'"),
        ({"search_budget": 0.5}, r"search_budget must be a number in \[1"),
        ({"per_device_train_batch_size": 5}, "is not a multiple of num_generations 2"),
    ],
)
def test_wrong_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)
