from __future__ import annotations

import pytest
import torch

from dina_reward.modeling.heads.ensemble import member_weights
from dina_reward.modeling.spread import ScoreParts, score_spread
from tests.training.tiny_reward import LATENT_SHAPE, tiny_reward


ONE = torch.ones(1)


def parts(draws=1, levels=1, members=1, batch=3):
    generator = torch.Generator().manual_seed(0)
    each = torch.randn(members, levels, draws, batch, generator=generator)
    return ScoreParts(each.mean(dim=(0, 1)), each.mean(dim=0), each.mean(dim=1))


def test_spread_over_draws_and_heads_is_the_standard_deviation():
    scores = parts(draws=4, members=3)
    torch.testing.assert_close(score_spread(scores, ONE, "draws"), scores.draws.std(dim=0))
    torch.testing.assert_close(score_spread(scores, ONE, "heads"), scores.members.mean(dim=1).std(dim=0))


def test_spread_over_levels_believes_levels_as_the_likelihood_does():
    scores = parts(levels=3)
    torch.testing.assert_close(score_spread(scores, torch.ones(3), "levels"), scores.levels[:, 0].std(dim=0))
    first_two = score_spread(scores, torch.tensor([1.0, 1.0, 1e9]), "levels")
    a, b = scores.levels[:2, 0]
    torch.testing.assert_close(first_two, (a - b).abs() / 2 * (3 / 2) ** 0.5, atol=1e-5, rtol=1e-4)


def test_default_is_what_there_are_several_of():
    both = parts(draws=2, levels=2, members=2)
    assert torch.equal(score_spread(both, torch.ones(2)), score_spread(both, torch.ones(2), "heads"))
    assert torch.equal(score_spread(parts(2, 2), torch.ones(2)), score_spread(parts(2, 2), torch.ones(2), "draws"))
    with pytest.raises(ValueError, match="a spread over draws needs several of them"):
        score_spread(parts(), ONE)
    with pytest.raises(ValueError, match="a spread over heads needs several"):
        score_spread(both.__class__(both.draws, both.levels, both.members[:1]), torch.ones(2), "heads")
    with pytest.raises(ValueError, match="unknown spread"):
        score_spread(both, torch.ones(2), "noise")


def test_members_leave_out_a_quarter_each_whatever_the_batch():
    latents = torch.randn(4000, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    weights = member_weights(latents, 3)
    assert weights.shape == (3, 4000)
    torch.testing.assert_close(weights.mean(dim=1), torch.ones(3), atol=0.03, rtol=0)
    assert torch.equal(member_weights(latents[7:9], 3), weights[:, 7:9])
    agreement = (weights[0] == weights[1]).float().mean()
    assert 0.55 < agreement < 0.7  # of independent choices .625


@pytest.fixture(scope="module")
def reward(sd3_pipeline):
    return tiny_reward(pipeline=sd3_pipeline).eval()


LATENTS = torch.randn(3, *LATENT_SHAPE, generator=torch.Generator().manual_seed(1))


def test_conservative_scores(reward):
    options = {"seed": 4, "num_noise_samples": 4}
    plain = reward.score(LATENTS, "a cat", **options)
    cautious = reward.score(LATENTS, "a cat", kappa=2.0, **options)
    assert plain.spread is None
    torch.testing.assert_close(cautious.spread, plain.noise_std)
    torch.testing.assert_close(cautious.scores, plain.scores - 2 * plain.noise_std)
    torch.testing.assert_close(reward(LATENTS, "a cat", kappa=2.0, **options), cautious.scores)
    normal = reward.score(LATENTS, "a cat", kappa=2.0, normalize=True, **options)
    torch.testing.assert_close(normal.scores, (cautious.scores + 10) / 10)
    split = reward(LATENTS, "a cat", kappa=2.0, batch_size=1, **options)
    torch.testing.assert_close(split, cautious.scores, atol=1e-5, rtol=1e-5)
    levels = reward.score(LATENTS, "a cat", kappa=1.0, seed=4, noise_level=(0.2, 0.5))
    assert bool((levels.spread > 0).all())


def test_conservative_scores_have_a_gradient(reward):
    latents = LATENTS.clone().requires_grad_()
    reward.score(latents, "a cat", kappa=1.0, seed=4, num_noise_samples=2).scores.sum().backward()
    assert torch.isfinite(latents.grad).all()
    assert float(latents.grad.abs().max()) > 0


def test_conservative_options_that_do_not_fit(reward):
    with pytest.raises(ValueError, match="needs several of them"):
        reward(LATENTS, "a cat", kappa=1.0, seed=0)
    with pytest.raises(ValueError, match="kappa must be a finite number"):
        reward(LATENTS, "a cat", kappa=-1.0, num_noise_samples=2)
    with pytest.raises(ValueError, match="preference does not take"):
        reward.preference(LATENTS, LATENTS, "a cat", kappa=1.0)
