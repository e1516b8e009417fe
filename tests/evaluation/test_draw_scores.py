from __future__ import annotations

from typing import Any

import pytest
import torch

from dina_reward.evaluation import DrawMargins, score_draws
from dina_reward.likelihood import ThurstoneModel
from dina_reward.noise.draws import draw_noise, fold_seed
from dina_reward.reward import LatentReward
from tests.training.tiny_reward import separable_pairs, tiny_reward


@pytest.fixture(scope="module")
def reward(sd3_pipeline: Any) -> LatentReward:
    return tiny_reward(pipeline=sd3_pipeline).eval()


def test_scores_are_those_of_the_reward_whatever_the_batch(reward: LatentReward) -> None:
    pairs = separable_pairs(4)
    found = score_draws(reward, pairs, (0.2, 0.6), ensembles=[(0.2, 0.6)], draws=3, progress=False, batch_size=3)
    assert found.margins.shape == (4, 2, 3)
    again = score_draws(reward, pairs, (0.2, 0.6), ensembles=[(0.2, 0.6)], draws=3, progress=False, batch_size=8)
    torch.testing.assert_close(found.margins, again.margins, atol=1e-5, rtol=1e-4)
    for key, tokens in found.tokens.items():
        torch.testing.assert_close(tokens, again.tokens[key], atol=1e-5, rtol=1e-4)
    sides = torch.stack([pairs[2]["chosen"], pairs[2]["rejected"]])
    noise = draw_noise(sides[:1], num_samples=3, seed=[fold_seed(0, 2)])

    def margin(**options: Any) -> float:
        scores = reward(sides, pairs[2]["prompt"], **options)
        return float(scores[0] - scores[1])

    for draw in range(3):
        assert float(found.at(0.6)[2, draw]) == pytest.approx(margin(noise_level=0.6, noise=noise[draw]), abs=1e-5)
        shared = margin(noise_level=(0.2, 0.6), noise=noise[draw])
        assert float(found.tokens[(0.2, 0.6), True][2, draw]) == pytest.approx(shared, abs=1e-5)
        own = torch.stack([noise[draw], noise[(draw + 1) % 3]])[:, None]
        expected = margin(noise_level=(0.2, 0.6), noise=own, share_noise_across_levels=False)
        assert float(found.tokens[(0.2, 0.6), False][2, draw]) == pytest.approx(expected, abs=1e-5)
        mean = margin(noise_level=(0.2, 0.6), noise=own, share_noise_across_levels=False, ensemble="mean")
        assert float(found.of_levels((0.2, 0.6), shared=False)[2, draw]) == pytest.approx(mean, abs=1e-5)
    assert not torch.allclose(found.tokens[(0.2, 0.6), True], found.tokens[(0.2, 0.6), False])


def test_averages_by_hand() -> None:
    margins = torch.tensor([[[1.0, 2.0, 6.0], [10.0, 20.0, 60.0]]])
    made = DrawMargins((0.2, 0.8), margins, {}, torch.ones(1), ["p"], ThurstoneModel())
    assert made.draws == 3
    assert made.of_draws(0.2, 1).tolist() == [[1.0, 2.0, 6.0]]
    assert made.of_draws(0.2, 2).tolist() == [[1.5, 4.0, 3.5]]
    assert made.of_draws(0.8, 3).tolist() == [[30.0]]
    assert made.of_levels((0.2, 0.8), shared=True).tolist() == [[5.5, 11.0, 33.0]]
    assert made.of_levels((0.2, 0.8), shared=False).tolist() == [[10.5, 31.0, 8.0]]
    with pytest.raises(ValueError, match="cannot average 4 draws of 3"):
        made.of_draws(0.2, 4)
    with pytest.raises(ValueError, match="4 levels with noise of their own need as many draws, got 3"):
        made.of_levels((0.2, 0.8, 0.2, 0.8), shared=False)


def test_too_few_draws_are_refused(reward: LatentReward) -> None:
    for ensembles, draws in (((), 1), ([(0.2, 0.4, 0.6)], 2)):
        with pytest.raises(ValueError, match=f"got {draws} noise draws; at least two"):
            score_draws(reward, separable_pairs(2), (0.2,), ensembles=ensembles, draws=draws, progress=False)
