"""What a method of search is, and the arithmetic that several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from dina_reward.search.particles import Particles, rows_of
from dina_reward.search.run import SearchRun


class SearchMethod(ABC):
    """A way to spend denoiser calls; subclasses are frozen dataclasses of its settings.

    Class attributes:
        name: by which `search` and the command line know it.
        needs_noise: whether it takes stochastic steps.
    """

    name: ClassVar[str]
    needs_noise: ClassVar[bool] = False

    @abstractmethod
    def run(self, run: SearchRun) -> tuple[Particles, Tensor]:
        """Searches.

        Returns:
            Clean latents, at most `run.keep` of each prompt, the best first, and their scores.

        Raises:
            ValueError: the budget does not pay for the settings.
        """


def checkpoints(fractions: Sequence[float], steps: int) -> list[int]:
    """Numbers of denoising steps nearest to fractions of them all, inside the trajectory, increasing, each once."""
    return sorted({min(max(round(fraction * steps), 1), steps - 1) for fraction in fractions if steps > 1})


def stochastic_steps(tail: float, steps: int) -> range:
    """The steps but the last share of them, and never the last one, which ends at the clean latent."""
    return range(steps - max(1, round(tail * steps)))


def affordable(budget: float, cost: float, what: str, advice: str) -> int:
    """How many of something a budget pays for.

    Args:
        budget, cost: in the same unit, per prompt.
        what, advice: for the message.

    Raises:
        ValueError: not even one.
    """
    count = int((budget + 1e-9) / cost)
    if count < 1:
        raise ValueError(
            f"the budget does not pay for {what}: that takes the denoiser calls of {cost:g} samples per prompt and "
            f"{budget:g} are left; {advice}"
        )
    return count


def check_keep(count: int, keep: int, name: str) -> None:
    """Refuses to return more samples than a method ends with."""
    if count < keep:
        raise ValueError(
            f"{name} ends with {count} samples per prompt at this budget, but keep is {keep}; raise budget or lower keep"
        )


def settled_prompts(
    run: SearchRun,
    particles: Particles,
    scores: Tensor,
    threshold: float | None,
    confidence: float | None,
) -> set[int]:
    """Prompts whose best rows are good enough, or surely the best.

    Args:
        threshold: the ``keep`` best scores all reach it.
        confidence: each of the ``keep`` best is better than the first of the others with this probability, by the
            uncertainty of the reward at the level of the states.
    """
    settled, level = set(), run.noise_level(particles.index)
    for number, rows in rows_of(particles.prompt).items():
        ordered = scores[rows].sort(descending=True).values
        if len(ordered) < run.keep:
            continue
        last = ordered[run.keep - 1]
        if threshold is not None and float(last) >= threshold:
            settled.add(number)
        elif confidence is not None and len(ordered) > run.keep:
            sure = float(run.judge.probability(last, ordered[run.keep], level)) >= confidence
            settled |= {number} if sure else set()
    return settled


def check_confidence(run: SearchRun, confidence: float | None) -> None:
    """Refuses to stop by the uncertainty of rewards that state none."""
    if confidence is not None and not run.judge.is_calibrated:
        raise ValueError(
            "confidence stops by the reward's own uncertainty, which only a LatentReward with a Thurstone likelihood has; "
            "use threshold, or neither"
        )
