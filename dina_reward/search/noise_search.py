"""Search around the initial latent (arXiv 2501.09732): neighbours of the best noise, and paths that go back and forth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dina_reward.alignment.sampling.seeding import Stream
from dina_reward.checks.values import check_fields
from dina_reward.search.method import SearchMethod, affordable, check_keep
from dina_reward.search.particles import Particles, best_rows
from dina_reward.search.run import SearchRun


def neighbours_on_sphere(noise: Tensor, directions: Tensor, similarity: float) -> Tensor:
    """Noise of the same norm at a given cosine: ``n' = |n| (s u + sqrt(1 - s^2) w)``.

    ``u = n / |n|`` and ``w`` is the unit component of a direction orthogonal to ``u``. The norm is kept exactly, so
    neighbours are as typical of the initial distribution as the noise itself.

    Args:
        noise, directions: shape ``(rows, ...)``, float32.
        similarity: cosine ``s`` between a noise and its neighbour, in ``[0, 1)``.
    """
    flat, other = noise.flatten(start_dim=1).double(), directions.flatten(start_dim=1).double()
    norm = flat.norm(dim=1, keepdim=True)
    unit = flat / norm
    other = other - (other * unit).sum(dim=1, keepdim=True) * unit
    other = other / other.norm(dim=1, keepdim=True)
    moved = norm * (similarity * unit + math.sqrt(1 - similarity**2) * other)
    return moved.view(noise.shape).to(noise.dtype)


@dataclass(frozen=True)
class ZeroOrder(SearchMethod):
    """Zero-order search (arXiv 2501.09732): neighbours of the best initial noise so far, round after round.

    The best noise moves where a neighbour's sample scores higher. Scores do not have to be of finished samples: with
    ``judged_at`` below 1 neighbours are only sampled so far, their states are scored, and the best alone is finished, so
    that the budget pays for more rounds.

    Args:
        neighbours (`int`): per round.
        first (`int`): independent noises to begin with, of which the best is the first pivot.
        similarity (`float`): cosine between a noise and its neighbour.
        judged_at (`float`): share of the denoising steps after which samples are scored.
    """

    name = "zero_order"

    neighbours: int = 4
    first: int = 1
    similarity: float = 0.95
    judged_at: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, neighbours=(1, math.inf), first=(1, math.inf), similarity=(0, 1), judged_at=(0, 1))
        if self.similarity == 1:
            raise ValueError(
                "similarity is 1, so that all neighbours would be the noise itself; take .95, for example"
            )

    def run(self, run: SearchRun) -> tuple[Particles, Tensor]:
        stop = min(max(round(self.judged_at * run.steps), 1), run.steps)
        each = stop + (run.lookahead if stop < run.steps else 0)
        rest = run.keep * (run.steps - stop) if stop < run.steps else 0
        rounds = affordable(
            run.budget - (rest + self.first * each) / run.steps,
            self.neighbours * each / run.steps,
            f"a round of {self.neighbours} neighbours",
            "raise budget or lower neighbours",
        )
        check_keep(self.first + rounds * self.neighbours, run.keep, self.name)
        start = run.draw(range(self.first))
        pool, scores = run.score(run.advance(start, stop))
        begun = [start]
        for number in range(rounds):
            best = best_rows(scores, pool.prompt, 1)
            neighbours = self._neighbours(run, Particles.cat(begun).latents[best], pool.take(best), number)
            tried, tried_scores = run.score(run.advance(neighbours, stop))
            begun.append(neighbours)
            pool, scores = Particles.cat([pool, tried]), torch.cat([scores, tried_scores])
        if stop < run.steps:
            pool = pool.take(best_rows(scores, pool.prompt, run.keep))
            pool, scores = run.score(run.advance(pool, run.steps))
        return run.finish(pool, scores)

    def _neighbours(self, run: SearchRun, noise: Tensor, pivots: Particles, number: int) -> Particles:
        """Fresh initial latents around those of the pivots, one per prompt."""
        first = self.first + number * self.neighbours
        rows = [row for row in range(len(pivots)) for _ in range(self.neighbours)]
        streams = [first + copy for _ in range(len(pivots)) for copy in range(self.neighbours)]
        fresh = pivots.take(rows, streams)
        keys = list(zip(fresh.prompt, fresh.stream, strict=True))
        directions = run.noise(Stream.SEARCH, keys).to(run.device)
        latents = neighbours_on_sphere(noise[rows].float(), directions, self.similarity)
        return replace(fresh, latents=latents.to(noise.dtype), index=0, prediction=None)


@dataclass(frozen=True)
class PathSearch(SearchMethod):
    """Search over paths (arXiv 2501.09732): states are noised back a little, several times, and denoised further than that.

    Beginning after ``start`` of the steps, each of the best states is noised back by ``back`` steps in several ways, every
    one is denoised by ``ahead`` steps, and the best states of the prompt go on, until the trajectory ends. All steps are
    deterministic. The budget sets how many states go on.

    Args:
        branches (`int`): ways in which a state is noised.
        start, back, ahead (`float`): shares of the denoising steps, each rounded to at least one step; ``ahead`` is the
            greater of the last two.
    """

    name = "paths"

    branches: int = 2
    start: float = 0.3
    back: float = 0.1
    ahead: float = 0.3

    def __post_init__(self) -> None:
        check_fields(self, branches=(2, math.inf), start=(0, 1), back=(0, 1), ahead=(0, 1))
        if not self.back < self.ahead:
            raise ValueError(
                f"ahead must be greater than back, or paths never end; got ahead={self.ahead}, back={self.back}"
            )

    def rounds(self, steps: int) -> list[tuple[int, int, int]]:
        """Of each round, the steps where states are, where they are noised back to, and where they are scored."""
        at = min(max(round(self.start * steps), 1), steps - 1)
        back = max(round(self.back * steps), 1)
        ahead = max(round(self.ahead * steps), back + 1)
        rounds = []
        while at < steps:
            behind = max(at - back, 0)
            to = behind + ahead
            if to >= steps:
                break
            rounds.append((at, behind, to))
            at = to
        return rounds

    def cost(self, steps: int, lookahead: int = 0) -> int:
        """Denoiser calls per state that goes on, without classifier-free guidance."""
        rounds = self.rounds(steps)
        if not rounds:
            return steps
        tried = sum(self.branches * (to - behind + lookahead) for _, behind, to in rounds)
        return rounds[0][0] + tried + steps - rounds[-1][2]

    def run(self, run: SearchRun) -> tuple[Particles, Tensor]:
        cost = self.cost(run.steps, run.lookahead) / run.steps
        width = affordable(run.budget, cost, "one path", "raise budget, lower branches or ahead, or raise back")
        check_keep(width, run.keep, self.name)
        particles = run.draw(range(width))
        slots = particles.stream
        for number, (at, behind, to) in enumerate(self.rounds(run.steps)):
            branches = run.advance(particles, at).branch(self.branches)
            tried, scores = run.score(run.advance(run.renoise(branches, behind, number), to))
            particles = run.retain(tried, scores, best_rows(scores, tried.prompt, width), slots)
        particles, scores = run.score(run.advance(particles, run.steps))
        return run.finish(particles, scores)
