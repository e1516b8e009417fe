"""What a search returns: the samples, how they were scored along the way, where they came from, and what it all cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dina_reward.alignment.generator import Generator
from dina_reward.search.method import SearchMethod
from dina_reward.search.pairs import SearchPair
from dina_reward.search.particles import Check, rows_of


@dataclass(frozen=True)
class Ancestor:
    """A returned sample as it was at a check.

    Args:
        step (`int`): denoising steps made.
        noise_level (`float`): of its state.
        score (`float`): of its state.
        rank (`int`): its place among the rows of its prompt at that check, 0 for the best.
    """

    step: int
    noise_level: float
    score: float
    rank: int


@dataclass(frozen=True)
class SearchResult:
    """Samples that a search has found.

    Args:
        latents (`Tensor`): clean latents, spatial layout, shape ``(prompts * keep, ...)``: the best of the first prompt, its
            next best, ..., then those of the second prompt. A `LatentReward` takes them with `prompts` as they are.
        prompts (`list[str]`): one per latent.
        scores (`Tensor`): weighted sum of the rewards, shape ``(prompts * keep,)``, float32, on the CPU.
        trace (`list[Check]`): everything that was scored, in order.
        nodes (`list[int]`): node of each latent in the trace.
        method (`SearchMethod`): with its settings.
        budget (`float`): denoiser calls per prompt that were allowed, in whole samples.
        num_inference_steps (`int`): denoising steps of a sample.
        seconds (`float`): wall-clock time.
        pairs (`list[SearchPair]`): chosen against rejected rows, if they were asked for.
    """

    latents: Tensor
    prompts: list[str]
    scores: Tensor
    trace: list[Check]
    nodes: list[int]
    method: SearchMethod
    budget: float
    num_inference_steps: int
    seconds: float
    generator: Generator = field(repr=False)
    batch_size: int = field(default=8, repr=False)
    pairs: list[SearchPair] = field(default_factory=list, repr=False)

    @property
    def denoiser_calls(self) -> int:
        """Evaluations of the denoiser on one sample at one timestep; two under classifier-free guidance."""
        return self.generator.calls.rollout + self.generator.calls.update

    @property
    def reward_calls(self) -> int:
        """States or clean latents scored, by all rewards together."""
        return self.generator.calls.reward

    @property
    def decoder_calls(self) -> int:
        """Samples decoded to pixels, for rewards that look at images and by `images`."""
        return self.generator.calls.decoder

    @cached_property
    def _decoded(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.generator.decode(part).cpu() for part in self.latents.split(self.batch_size)])

    def images(self) -> Tensor:
        """The latents decoded, in [0, 1], on the CPU; once, at the first call, which counts as decoder calls.

        Returns:
            `Tensor`: shape ``(rows, 3, height, width)``; of videos ``(rows, frames, 3, height, width)``.
        """
        return self._decoded

    def packed_latents(self) -> Tensor:
        """The latents in the layout of the pipeline, as it returns them for ``output_type="latent"``."""
        return self.generator.family.pack_latents(self.latents)

    def places(self, row: int = 0) -> list[tuple[int, int]]:
        """Where a returned latent's ancestors stand in the trace, from the first to itself: number of the check, and row."""
        firsts, places = [check.first for check in self.trace], []
        node = self.nodes[row]
        while node >= 0:
            number = bisect_right(firsts, node) - 1
            places.append((number, node - firsts[number]))
            node = self.trace[number].parent[node - firsts[number]]
        return places[::-1]

    def lineage(self, row: int = 0) -> list[Ancestor]:
        """A returned latent's ancestors at all checks where they were scored, from the first to itself."""
        return [_ancestor(self.trace[number], place) for number, place in self.places(row)]

    def check_table(self) -> list[dict[str, float]]:
        """One line per check: step, noise level, rows scored and kept, mean and best score, averaged over prompts."""
        return [
            {
                "step": check.step,
                "noise_level": check.noise_level,
                "scored": len(check.prompt),
                "kept": len(set(check.kept)),
                "mean_score": float(check.scores.mean()),
                "best_score": _mean_best(check.scores, check.prompt),
            }
            for check in self.trace
        ]


def _mean_best(scores: Tensor, prompt: Sequence[int]) -> float:
    return float(torch.stack([scores[rows].max() for rows in rows_of(prompt).values()]).mean())


def _ancestor(check: Check, row: int) -> Ancestor:
    rivals = check.scores[rows_of(check.prompt)[check.prompt[row]]]
    score = check.scores[row]
    return Ancestor(check.step, check.noise_level, float(score), int((rivals > score).sum()))
