"""Selection of single steps or blocks of steps: several successors of one state, of which the best goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dina_reward.checks.values import check_fields
from dina_reward.search.method import SearchMethod, affordable, check_keep
from dina_reward.search.particles import Particles
from dina_reward.search.run import SearchRun


@dataclass(frozen=True)
class Stepwise(SearchMethod):
    """At every step (or block of steps) of a window, draws several stochastic successors and goes on with the best.

    Successors of one state share the denoiser's prediction there, so a block of ``B`` steps with ``M`` branches takes
    ``1 + M (B - 1)`` denoiser calls: with ``B = 1`` (step-wise sampling of arXiv 2605.25661) the denoiser is not multiplied
    at all. Longer blocks are CoDe's (arXiv 2502.00968). Rewards that need predicted clean latents take one call per branch
    instead (SVDD-PM, arXiv 2408.08252), of which the winner's is used in the next step. The budget sets how many chains run
    side by side, the best of which are returned.

    Args:
        branches (`int`): ``M``.
        block (`int`): ``B``.
        window (`tuple[float, float]`): share of the steps where selection begins and ends; steps outside are deterministic.
    """

    name = "stepwise"
    needs_noise = True

    branches: int = 4
    block: int = 1
    window: tuple[float, ...] = (0.0, 0.75)

    def __post_init__(self) -> None:
        check_fields(self, branches=(2, math.inf), block=(1, math.inf), window=(0, 1))
        if len(self.window) != 2 or not self.window[0] < self.window[1]:
            raise ValueError(
                f"window must be two increasing shares of the steps, such as (0, 0.75), got {self.window}"
            )

    def blocks(self, steps: int) -> list[range]:
        """Steps of each block; the last one may be shorter."""
        start = round(self.window[0] * steps)
        stop = min(max(round(self.window[1] * steps), start + 1), steps - 1)
        return [range(first, min(first + self.block, stop)) for first in range(start, stop, self.block)]

    def cost(self, steps: int, lookahead: int = 0) -> int:
        """Denoiser calls of one chain, without classifier-free guidance."""
        blocks = self.blocks(steps)
        inside = sum(1 + self.branches * (len(block) - 1) + lookahead * (self.branches - 1) for block in blocks)
        return inside + steps - sum(map(len, blocks))

    def run(self, run: SearchRun) -> tuple[Particles, Tensor]:
        cost = self.cost(run.steps, run.lookahead) / run.steps
        chains = affordable(run.budget, cost, "one chain", "raise budget, or lower branches or block")
        check_keep(chains, run.keep, self.name)
        particles = run.draw(range(chains))
        slots = particles.stream
        for block in self.blocks(run.steps):
            parents = run.look(run.advance(particles, block.start))
            tried, scores = run.score(run.advance(parents.branch(self.branches), block.stop, block))
            best = scores.view(-1, self.branches).argmax(dim=1).tolist()
            rows = [parent * self.branches + place for parent, place in enumerate(best)]
            particles = run.retain(tried, scores, rows, slots)
        particles, scores = run.score(run.advance(particles, run.steps))
        return run.finish(particles, scores)
