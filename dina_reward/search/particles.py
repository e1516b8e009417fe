"""Samples that a search has under way: rows of one step, each with its prompt, its noise stream and where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


NO_PARENT = -1


@dataclass(frozen=True)
class Particles:
    """States of several samples of several prompts, all before the same step.

    Args:
        latents (`Tensor`): shape ``(rows, ...)``, spatial layout.
        prompt (`list[int]`): number of the prompt of each row.
        stream (`list[int]`): what tells the row's random draws from those of other rows of its prompt.
        index (`int`): the step that comes next; the number of steps for clean latents.
        parent (`list[int]`): node of the search that each row was last scored as, -1 if it never was; see `Check`.
        prediction (`Tensor`, *optional*): what the denoiser says about these states, where it was asked already.
    """

    latents: Tensor
    prompt: list[int]
    stream: list[int]
    index: int
    parent: list[int]
    prediction: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt)

    def take(self, rows: Sequence[int], streams: Sequence[int] | None = None) -> Particles:
        """Some rows, in the order given and as often as they are named.

        Args:
            rows: their numbers.
            streams: new noise streams, one per row taken; rows that are taken twice need them to part.
        """
        picked = torch.tensor(list(rows), dtype=torch.long, device=self.latents.device)
        return replace(
            self,
            latents=self.latents[picked],
            prompt=[self.prompt[row] for row in rows],
            stream=[self.stream[row] for row in rows] if streams is None else list(streams),
            parent=[self.parent[row] for row in rows],
            prediction=None if self.prediction is None else self.prediction[picked],
        )

    def branch(self, count: int) -> Particles:
        """Every row ``count`` times, neighbours, each with a noise stream of its own."""
        rows = [row for row in range(len(self)) for _ in range(count)]
        streams = [self.stream[row] * count + copy for row in range(len(self)) for copy in range(count)]
        return self.take(rows, streams)

    def chunks(self, size: int) -> Iterator[Particles]:
        """Parts of at most ``size`` rows."""
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    @classmethod
    def cat(cls, parts: Sequence[Particles]) -> Particles:
        """Rows of several parts that stand before the same step."""
        predictions = [part.prediction for part in parts]
        known = [prediction for prediction in predictions if prediction is not None]
        return cls(
            latents=torch.cat([part.latents for part in parts]),
            prompt=[number for part in parts for number in part.prompt],
            stream=[number for part in parts for number in part.stream],
            index=parts[0].index,
            parent=[number for part in parts for number in part.parent],
            prediction=torch.cat(known) if len(known) == len(parts) else None,
        )


@dataclass(frozen=True)
class Check:
    """Rows that were scored together. Nodes are numbered through over all checks of a search.

    Args:
        first (`int`): node of the first row.
        step (`int`): denoising steps made; all of them: clean latents.
        noise_level (`float`): level of the states, 0 for clean latents.
        prompt (`list[int]`): number of the prompt of each row.
        parent (`list[int]`): node that each row came from, -1 for a fresh one.
        scores (`Tensor`): weighted sum of the rewards, shape ``(rows,)``, float32, on the CPU.
        kept (`list[int]`): rows that went on, in any order; of particle filters as often as they did.
        weights (`Tensor`, *optional*): normalised weights of the rows inside their prompts, of particle filters alone.
    """

    first: int
    step: int
    noise_level: float
    prompt: list[int]
    parent: list[int]
    scores: Tensor
    kept: list[int]
    weights: Tensor | None = None

    @property
    def nodes(self) -> range:
        """The nodes of the rows."""
        return range(self.first, self.first + len(self.prompt))

    def effective(self) -> dict[int, float]:
        """Effective number of particles by prompt, ``1 / sum w^2``, of particle filters; else nothing."""
        if self.weights is None:
            return {}
        return {number: float(1 / self.weights[rows].square().sum()) for number, rows in rows_of(self.prompt).items()}


def rows_of(prompt: Sequence[int]) -> dict[int, list[int]]:
    """Rows of each prompt, by its number, in ascending order of both."""
    rows: dict[int, list[int]] = {number: [] for number in sorted(set(prompt))}
    for row, number in enumerate(prompt):
        rows[number].append(row)
    return rows


def best_rows(scores: Tensor, prompt: Sequence[int], keep: int) -> list[int]:
    """The rows of the ``keep`` highest scores of each prompt: prompts in order, the best of each first; ties by row."""
    chosen = []
    for rows in rows_of(prompt).values():
        order = scores[rows].argsort(descending=True, stable=True)[:keep].tolist()
        chosen += [rows[place] for place in order]
    return chosen
