"""Search around the initial latent: neighbours keep the norm, pivots never fall, paths return to the right distribution."""

from __future__ import annotations

import math

import pytest
import torch

from dina_reward.search import PathSearch, ZeroOrder
from dina_reward.search.noise_search import neighbours_on_sphere
from tests.search.helpers import gaussian_run


def test_neighbours_have_the_norm_and_the_cosine() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, directions = torch.randn(2, 3, 4, 5, 5, generator=generator)
    moved = neighbours_on_sphere(noise, directions, 0.9)
    flat, other = noise.flatten(1), moved.flatten(1)
    torch.testing.assert_close(other.norm(dim=1), flat.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(flat, other), torch.full((3,), 0.9))


@pytest.mark.parametrize(("judged_at", "calls"), [(1.0, (1 + 3 * 4) * 5), (0.6, (1 + 5 * 4) * 3 + 2)])
def test_zero_order_costs_and_never_falls(judged_at: float, calls: int) -> None:
    run = gaussian_run(prompts=2, budget=calls / 5, shape=(2, 2, 2))
    _, scores = ZeroOrder(neighbours=4, similarity=0.8, judged_at=judged_at).run(run)
    assert run.generator.calls.rollout == 2 * calls
    best = torch.full((2,), -math.inf)
    rounds = [check for check in run.trace if len(check.prompt) == 8]
    for check in rounds:
        pivots = torch.tensor([check.parent[0], check.parent[4]])
        earlier = torch.cat([before.scores for before in run.trace if before.first < check.first])
        assert torch.equal(earlier[pivots], torch.stack([_of(run, check, number) for number in range(2)]))
        best = torch.maximum(best, check.scores.view(2, 4).max(dim=1).values)
    assert bool((scores >= run.trace[0].scores).all()) or judged_at < 1
    assert len(rounds) == (calls / 5 - 1) // 4 or judged_at < 1


def _of(run: object, check: object, number: int) -> torch.Tensor:
    """Best score of a prompt before a check."""
    before = [c for c in run.trace if c.first < check.first]  # type: ignore[attr-defined]
    scores, prompts = torch.cat([c.scores for c in before]), [p for c in before for p in c.prompt]
    return scores[torch.tensor(prompts) == number].max()


def test_zero_order_keeps_several_and_refuses_small_budgets() -> None:
    run = gaussian_run(budget=9, keep=3, shape=(2, 2, 2))
    particles, scores = ZeroOrder(neighbours=4).run(run)
    assert len(particles) == 3
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)
    with pytest.raises(ValueError, match="does not pay for a round of 4 neighbours"):
        ZeroOrder(neighbours=4).run(gaussian_run(budget=4))
    with pytest.raises(ValueError, match="similarity is 1, so that all neighbours would be the noise itself"):
        ZeroOrder(similarity=1.0)


def test_renoising_is_the_forward_process() -> None:
    run = gaussian_run(steps=10, budget=1500)
    particles = run.draw(range(1500))
    clean = torch.full_like(particles.latents, 2.0)
    at = type(particles)(
        0.7 * clean + 0.3 * particles.latents, particles.prompt, particles.stream, 7, particles.parent
    )
    back = run.renoise(at, 4, 0)
    assert back.index == 4
    assert float(back.latents.mean()) == pytest.approx(0.4 * 2.0, abs=0.04)
    assert float(back.latents.std()) == pytest.approx(0.6, abs=0.03)
    assert not torch.equal(back.latents, run.renoise(at, 4, 1).latents)


def test_paths_by_hand() -> None:
    settings = PathSearch(branches=2, start=0.3, back=0.1, ahead=0.3)
    assert settings.rounds(10) == [(3, 2, 5), (5, 4, 7), (7, 6, 9)]
    assert settings.cost(10) == 3 + 3 * 2 * 3 + 1
    run = gaussian_run(steps=10, budget=4.4, prompts=2)
    _, scores = settings.run(run)
    assert run.generator.calls.rollout == 2 * 2 * 22
    assert [check.step for check in run.trace] == [5, 7, 9, 10]
    assert [len(check.prompt) for check in run.trace] == [8, 8, 8, 4]
    assert torch.equal(
        run.trace[0].scores[run.trace[0].kept].view(2, 2), run.trace[0].scores.view(2, 4).topk(2).values
    )
    assert float(scores.mean()) > 0.5
    with pytest.raises(ValueError, match="ahead must be greater than back, or paths never end"):
        PathSearch(back=0.3, ahead=0.3)
