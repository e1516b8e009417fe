"""Best of N samples: judged at the end, or early, by successive halving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dina_reward.checks.values import check_fields
from dina_reward.search.method import (
    SearchMethod,
    affordable,
    check_confidence,
    check_keep,
    checkpoints,
    settled_prompts,
)
from dina_reward.search.particles import Particles, rows_of
from dina_reward.search.run import SearchRun


@dataclass(frozen=True)
class BestOfN(SearchMethod):
    """Draws as many samples as the budget pays for and keeps the best: random search over the initial noise.

    ``N`` samples cost ``N`` times the denoiser calls of one. Selection costs at most ``ln N - (N - 1) / N`` nats of KL.

    Args:
        round_size (`int`, *optional*): samples per prompt drawn at a time; after each round, prompts that are settled draw
            no more. All at once by default.
        threshold (`float`, *optional*): a prompt is settled when its best (of the raw, weighted scores) reaches it.
        confidence (`float`, *optional*): or when the best is better than the next with this probability, by the reward's
            own noise-calibrated uncertainty.
    """

    name = "best_of_n"

    round_size: int | None = None
    threshold: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, round_size=(1, math.inf), confidence=(0.5, 1))

    def run(self, run: SearchRun) -> tuple[Particles, Tensor]:
        check_confidence(run, self.confidence)
        count = int(run.budget)
        check_keep(count, run.keep, self.name)
        size, open_prompts = self.round_size or count, list(range(len(run.prompts)))
        parts: list[Particles] = []
        scores: list[Tensor] = []
        for start in range(0, count, size):
            drawn = run.draw(range(start, min(start + size, count)), open_prompts)
            drawn, drawn_scores = run.score(run.advance(drawn, run.steps))
            parts.append(drawn)
            scores.append(drawn_scores)
            pool, pool_scores = Particles.cat(parts), torch.cat(scores)
            settled = settled_prompts(run, pool, pool_scores, self.threshold, self.confidence)
            open_prompts = [number for number in open_prompts if number not in settled]
            if not open_prompts:
                break
        return run.finish(pool, pool_scores)


@dataclass(frozen=True)
class Halving(SearchMethod):
    """Successive halving: scores half-finished samples, and only the better ones are finished.

    The states are scored at their own noise levels, so nothing is decoded and no clean latent is predicted. The budget sets
    how many samples are begun: as many as can be, so that what is saved on those given up pays for more of them.

    Args:
        checks (`tuple[float, ...]`): shares of the denoising steps after which to score.
        survivors (`float`): share of the samples that each check keeps, rounded up, and never below `keep`.
        candidates (`int`, *optional*): samples to begin with per prompt, if fewer than the budget pays for.
        threshold (`float`, *optional*): at a check, a prompt whose best score reaches it gives up all but its best.
        confidence (`float`, *optional*): so does one whose best is better than the next with this probability, by the
            reward's uncertainty at that level.
    """

    name = "halving"

    checks: tuple[float, ...] = (0.4, 0.6)
    survivors: float = 0.5
    candidates: int | None = None
    threshold: float | None = None
    confidence: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, checks=(0, 1), survivors=(0, 1), candidates=(1, math.inf), confidence=(0.5, 1))
        if not self.checks:
            raise ValueError(
                "checks is empty, so nothing would be halved; give at least one, such as 0.5, or use best_of_n"
            )
        if not 0 < self.survivors < 1:
            raise ValueError(f"survivors must lie strictly between 0 and 1, got {self.survivors}")

    def run(self, run: SearchRun) -> tuple[Particles, Tensor]:
        check_confidence(run, self.confidence)
        count = self._candidates(run)
        check_keep(count, run.keep, self.name)
        particles = run.draw(range(count))
        for check in checkpoints(self.checks, run.steps):
            particles, scores = run.score(run.advance(particles, check))
            settled = settled_prompts(run, particles, scores, self.threshold, self.confidence)
            rows = [
                row
                for number, members in rows_of(particles.prompt).items()
                for row in self._survivors(scores, members, run.keep, number in settled)
            ]
            particles = run.retain(particles, scores, rows)
        particles, scores = run.score(run.advance(particles, run.steps))
        return run.finish(particles, scores)

    def cost(self, candidates: int, steps: int, keep: int = 1, lookahead: int = 0) -> int:
        """Denoiser calls per prompt, without classifier-free guidance, if no prompt is settled early.

        Args:
            candidates: samples that are begun.
            steps: denoising steps of a whole sample.
            keep: samples that are returned.
            lookahead: calls that scoring a state takes; those of survivors are used in their next step.
        """
        calls, done, alive = 0, 0, candidates
        for check in checkpoints(self.checks, steps):
            calls += alive * (check - done)
            after = min(alive, max(keep, math.ceil(alive * self.survivors)))
            calls += lookahead * (alive - after)
            alive, done = after, check
        return calls + alive * (steps - done)

    def _candidates(self, run: SearchRun) -> int:
        def cost(count: int) -> float:
            return self.cost(count, run.steps, run.keep, run.lookahead) / run.steps

        most = affordable(run.budget, cost(1), "one sample", "raise budget")
        while cost(most + 1) <= run.budget + 1e-9:
            most += 1
        if self.candidates is None:
            return most
        if self.candidates > most:
            raise ValueError(
                f"{self.candidates} candidates take the denoiser calls of {cost(self.candidates):g} samples, and the budget "
                f"is {run.budget:g}, which pays for {most}; raise budget, or leave candidates to it"
            )
        return self.candidates

    def _survivors(self, scores: Tensor, rows: Sequence[int], keep: int, settled: bool) -> list[int]:
        count = keep if settled else max(keep, math.ceil(len(rows) * self.survivors))
        order = scores[list(rows)].argsort(descending=True, stable=True)[:count].tolist()
        return [rows[place] for place in order]
