from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from dina_reward.alignment.credit import check_scores_noisy, gains_to_go, state_scores
from dina_reward.alignment.rollout import Rollout
from dina_reward.alignment.samplers import build_sampler


class NoisyReward:
    """Scores noisy states by their mean, scaled by the level; remembers what it was asked."""

    def __init__(self):
        self.levels = []

    def __call__(self, latents, prompts):
        return latents.mean(dim=(1, 2, 3))

    def score_noisy(self, noisy_latents, prompts, noise_level):
        self.levels.append(noise_level)
        return noise_level * noisy_latents.mean(dim=(1, 2, 3))


def test_gains_by_hand():
    scores, final = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([6.0])
    assert gains_to_go(scores, final, 0.0).tolist() == [[2.0, -1.0, 4.0]]
    assert gains_to_go(scores, final, 1.0).tolist() == [[5.0, 3.0, 4.0]]
    assert gains_to_go(scores, final, 0.5).tolist() == [[2.5, 1.0, 4.0]]


@given(st.integers(1, 5), st.integers(0, 100))
def test_undiscounted_gains_telescope(states, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, final = torch.randn((4, states), generator=generator), torch.randn(4, generator=generator)
    torch.testing.assert_close(gains_to_go(scores, final, 1.0), final[:, None] - scores)


def test_states_are_scored_at_their_own_level():
    sampler = build_sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), 6, eta=0.8)
    states = {index: torch.full((2, 4, 3, 3), float(index)) for index in (3, 1, 2)}
    first, second = NoisyReward(), NoisyReward()
    scores = state_scores([first, second], [1.0, 3.0], Rollout(states[1], states), sampler, ["a", "b"], "cpu")
    assert first.levels == second.levels == [float(sampler.levels[index]) for index in (1, 2, 3)]
    expected = torch.tensor([4 * index * float(sampler.levels[index]) for index in (1, 2, 3)])
    torch.testing.assert_close(scores, expected.expand(2, 3))


def test_rewards_that_need_clean_latents_are_refused():
    def plain(latents):
        return latents

    check_scores_noisy([NoisyReward()])
    with pytest.raises(ValueError, match="which plain cannot do"):
        check_scores_noisy([NoisyReward(), plain])
