"""Preference pairs that a search leaves behind: what it chose and what it gave up, at a known noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dina_reward.search.judge import Judge
from dina_reward.search.particles import Particles, rows_of


SOURCE = "search"


@dataclass(frozen=True)
class SearchPair:
    """A row that went on and one of the same prompt that did not, at the same step.

    Args:
        prompt (`str`): text of both.
        chosen, rejected (`Tensor`): latents, spatial layout, without batch, on the CPU.
        noise_level (`float`): level of both, 0 for clean latents.
        p_chosen (`float`): probability, by the likelihood of the reward, that the chosen one is the better one.
    """

    prompt: str
    chosen: Tensor
    rejected: Tensor
    noise_level: float
    p_chosen: float

    def training_row(self) -> dict[str, Any]:
        """The row that `LatentRewardTrainer` and `OnlineDPOTrainer` train on; of clean pairs alone.

        Raises:
            ValueError: the latents are noisy, which trainers would noise again.
        """
        if self.noise_level:
            raise ValueError(
                f"this pair was judged at noise level {self.noise_level:.3g}, and training rows hold clean latents; take "
                "the pairs with noise_level 0"
            )
        return {
            "prompt": self.prompt,
            "chosen": self.chosen,
            "rejected": self.rejected,
            "p_chosen": self.p_chosen,
            "source": SOURCE,
        }


def pairs_of(
    particles: Particles,
    scores: Tensor,
    kept: set[int],
    prompts: Sequence[str],
    noise_level: float | None,
    judge: Judge,
) -> list[SearchPair]:
    """The best kept row of each prompt against the worst that was given up, the second best against the second worst, ...

    Pairs of equal scores are left out.
    """
    pairs = []
    for number, rows in rows_of(particles.prompt).items():
        order = sorted(rows, key=lambda row: -float(scores[row]))
        chosen = [row for row in order if row in kept]
        rejected = [row for row in reversed(order) if row not in kept]
        for better, worse in zip(chosen, rejected, strict=False):
            if not float(scores[better]) > float(scores[worse]):
                continue
            pairs.append(
                SearchPair(
                    prompt=prompts[number],
                    chosen=particles.latents[better].detach().cpu(),
                    rejected=particles.latents[worse].detach().cpu(),
                    noise_level=0.0 if noise_level is None else noise_level,
                    p_chosen=float(judge.probability(scores[better], scores[worse], noise_level)),
                )
            )
    return pairs
