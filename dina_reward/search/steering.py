"""Feynman-Kac steering: sequential Monte Carlo on the sampler's own steps towards ``base * exp(strength * r)``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dina_reward.alignment.sampling.seeding import Stream, generator_from
from dina_reward.checks.values import check_choice, check_fields
from dina_reward.search.method import SearchMethod, check_keep, checkpoints, stochastic_steps
from dina_reward.search.particles import Particles, rows_of
from dina_reward.search.run import SearchRun


Potential = Literal["difference", "max", "sum"]
Schedule = Literal["constant", "linear"]


@dataclass(frozen=True)
class FKSteering(SearchMethod):
    """Feynman-Kac steering (arXiv 2501.06848): particles are weighted at checks and resampled where weights are uneven.

    With ``z`` the score of a state, in units of calibrated preference (`Judge.unit`), and ``l`` the strength, the logarithm
    of a particle's total potential after a check is

    | potential | after a check | at the end |
    |---|---|---|
    | ``difference`` | ``l z`` | ``l z`` |
    | ``max`` | its last value plus ``l max(z so far)`` | ``l z`` |
    | ``sum`` | its last value plus ``l sum(z so far)`` | ``l z`` |

    and its weight is multiplied by the change, so that the target is ``base * exp(l z)`` whatever the checks. Weights stay
    logarithms, are normalised inside each prompt, and are carried over checks that do not resample; resampling is
    systematic. ``N`` particles cost ``N`` times the denoiser calls of one sample.

    Args:
        potential (`str`): see above.
        strength (`float`): ``l``. With a calibrated `LatentReward`, 1 weighs a difference of one standard deviation of what
            the reward cannot tell apart by a factor of ``e``.
        schedule (`str`): ``"constant"``, or ``"linear"``: ``l`` grows with the share of the steps made.
        checks (`tuple[float, ...]`): shares of the denoising steps after which particles are weighted.
        ess_threshold (`float`): resample a prompt's particles where their effective share is below; 1: at every check.
        ode_tail (`float`): share of the steps, the last ones, that are deterministic, so that no white noise of a stochastic
            step is left in the latents.
        calibrated (`bool`): measure scores in units of calibrated preference; otherwise as they are.
    """

    name = "fk"
    needs_noise = True

    potential: Potential = "difference"
    strength: float = 3.0
    schedule: Schedule = "constant"
    checks: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    ess_threshold: float = 0.5
    ode_tail: float = 0.25
    calibrated: bool = True

    def __post_init__(self) -> None:
        check_fields(self, strength=(0, 1e6), checks=(0, 1), ess_threshold=(0, 1), ode_tail=(0, 1))
        check_choice("potential", self.potential, get_args(Potential))
        check_choice("schedule", self.schedule, get_args(Schedule))

    def run(self, run: SearchRun) -> tuple[Particles, Tensor]:
        count = int(run.budget)
        check_keep(count, run.keep, self.name)
        particles, stochastic = run.draw(range(count)), stochastic_steps(self.ode_tail, run.steps)
        slots, potentials = particles.stream, _Potentials.new(len(particles))
        for check in [*checkpoints(self.checks, run.steps), run.steps]:
            particles, scores = run.score(run.advance(particles, check, stochastic))
            values = scores / run.judge.unit(run.noise_level(check)) if self.calibrated else scores
            potentials = potentials.after(values.double(), self, check / run.steps)
            weights = normalised_weights(potentials.log_weight, particles.prompt)
            run.note(weights=weights.float())
            if check < run.steps:
                ancestors, resampled = self._ancestors(run, particles, weights, check)
                particles = run.retain(particles, scores, ancestors, slots)
                potentials = potentials.take(ancestors, resampled)
        return run.finish(particles, scores)

    def _ancestors(
        self, run: SearchRun, particles: Particles, weights: Tensor, check: int
    ) -> tuple[list[int], list[int]]:
        """Row that each row goes on from, and the rows that were resampled."""
        ancestors, resampled = list(range(len(particles))), []
        for number, rows in rows_of(particles.prompt).items():
            own = weights[rows]
            if float(1 / own.square().sum()) < self.ess_threshold * len(rows):
                offset = torch.rand((), generator=generator_from(run.seed, Stream.SEARCH, number, check)).item()
                for row, place in zip(rows, systematic_resampling(own, offset), strict=True):
                    ancestors[row] = rows[place]
                resampled += rows
        return ancestors, resampled


@dataclass(frozen=True)
class _Potentials:
    """Of each particle, float64: unnormalised logarithm of its weight, of its total potential, and what that is made of."""

    log_weight: Tensor
    total: Tensor
    greatest: Tensor
    summed: Tensor

    @classmethod
    def new(cls, rows: int) -> _Potentials:
        zeros = torch.zeros(rows, dtype=torch.float64)
        return cls(zeros, zeros, torch.full_like(zeros, -torch.inf), zeros)

    def after(self, values: Tensor, settings: FKSteering, share: float) -> _Potentials:
        """After a check, at a share of the steps; the change of the total is what weights are multiplied with."""
        strength = settings.strength * (share if settings.schedule == "linear" else 1.0)
        greatest, summed = torch.maximum(self.greatest, values), self.summed + values
        if share == 1 or settings.potential == "difference":
            total = strength * values
        else:
            total = self.total + strength * (greatest if settings.potential == "max" else summed)
        return _Potentials(self.log_weight + total - self.total, total, greatest, summed)

    def take(self, ancestors: Sequence[int], resampled: Sequence[int]) -> _Potentials:
        log_weight = self.log_weight[list(ancestors)]
        log_weight[list(resampled)] = 0.0
        rest = (values[list(ancestors)] for values in (self.total, self.greatest, self.summed))
        return _Potentials(log_weight, *rest)


def normalised_weights(log_weight: Tensor, prompt: Sequence[int]) -> Tensor:
    """Weights that sum to 1 inside each prompt, shape ``(rows,)``; computed from logarithms, so that none overflows."""
    weights = torch.empty_like(log_weight)
    for rows in rows_of(prompt).values():
        weights[rows] = log_weight[rows].softmax(dim=0)
    return weights


def systematic_resampling(weights: Tensor, offset: float) -> list[int]:
    """Numbers of the particles that go on: ``i`` is named ``floor`` or ``ceil`` of ``n w_i`` times.

    Args:
        weights: normalised, shape ``(n,)``.
        offset: uniform in ``[0, 1)``; one for all particles.
    """
    count = len(weights)
    points = (torch.arange(count, dtype=torch.float64) + offset) / count
    chosen: list[int] = (
        torch.searchsorted(weights.double().cumsum(dim=0), points, right=True).clamp(max=count - 1).tolist()
    )
    return chosen
