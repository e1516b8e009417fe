"""What the rewards of a search add up to, and in which unit."""

from __future__ import annotations

import math

import pytest
import torch

from dina_reward.alignment.generator import Generator
from dina_reward.search.judge import Judge
from tests.search.helpers import closeness, tiny


def test_the_unit_is_the_deviation_of_a_difference() -> None:
    pipeline, reward = tiny()
    generator = Generator(pipeline)
    model = reward.preference_model
    alone, pair = Judge(generator, reward), Judge(generator, [reward, closeness], weights=[3.0, 1.0])
    for level in (0.2, 0.9):
        variance = float(model.variance(torch.tensor(level)))  # type: ignore[attr-defined]
        assert alone.unit(level) == pytest.approx(math.sqrt(2 * variance))
        assert pair.unit(level) == pytest.approx(3 * math.sqrt(2 * variance))
    assert Judge(generator, reward, settings={"noise_level": [0.9]}).unit(None) == pytest.approx(alone.unit(0.9))
    assert Judge(generator, closeness).unit(0.5) == 1.0
    a, b, level = torch.tensor([1.0]), torch.tensor([0.2]), torch.tensor([0.5])
    torch.testing.assert_close(alone.probability(a, b, 0.5), model.probability(a, b, level), atol=1e-5, rtol=0)
    assert alone.is_calibrated
    assert not Judge(generator, closeness).is_calibrated


def test_rows_that_no_reward_applies_to_lose_against_all() -> None:
    def nothing(latents: torch.Tensor) -> None:
        return None

    pipeline, _ = tiny()
    generator = Generator(pipeline, max_sequence_length=8)
    latents, conditioning = torch.zeros(2, 16, 4, 4), generator.encode(["a", "b"], torch.device("cpu"))
    facts = (["a", "b"], conditioning, [0, 1])
    assert Judge(generator, nothing).clean(latents, *facts).tolist() == [-math.inf] * 2
    both = Judge(generator, [nothing, closeness], weights=[5.0, 2.0])
    torch.testing.assert_close(both.clean(latents, *facts), 2 * closeness(latents))
    assert generator.calls.reward == 4


def test_images_have_no_gradient_here() -> None:
    def pixels(images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))

    judge = Judge(Generator(tiny()[0]), pixels)
    with pytest.raises(ValueError, match="pixels takes images, and gradients stay in latent space"):
        judge.differentiable_clean(torch.zeros(1, 16, 4, 4), ["a"], None, [0])  # type: ignore[arg-type]
