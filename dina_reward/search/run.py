"""What every method of search is made of: draw, look, advance, score, keep; all calls are counted and batches bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.generator import Generator
from dina_reward.alignment.sampling.rollout import PredictFunction, sample
from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.alignment.sampling.seeding import Stream, noise_by_row
from dina_reward.families import Conditioning
from dina_reward.noise import NoiseProcess
from dina_reward.noise.draws import fold_seed
from dina_reward.search.judge import Judge
from dina_reward.search.pairs import SearchPair, pairs_of
from dina_reward.search.particles import NO_PARENT, Check, Particles, best_rows, rows_of


Bend = Callable[[PredictFunction, Particles], PredictFunction]
"""``(predict, its rows before the first step) -> predict``: what guidance makes of the denoiser."""


@dataclass
class SearchRun:
    """One search under way: the sampler, the judge, what was scored so far.

    Everything random is a function of ``(seed, prompt number, noise stream, step)``, so results do not depend on how rows
    are split into batches (up to rounding of matrix products of other shapes).

    Args:
        generator: the pipeline.
        judge: its rewards.
        sampler: grid, deterministic and stochastic steps.
        prompts: the prompts.
        latent_shape: of one latent, spatial layout.
        device: where the denoiser is.
        budget: denoiser calls per prompt, in whole samples.
        keep: samples per prompt to return.
        batch_size: rows per pass of denoiser, reward and decoder.
        seed: of all draws.
        collect_pairs: whether to keep the latents of chosen and rejected rows.
    """

    generator: Generator
    judge: Judge
    sampler: Sampler
    prompts: list[str]
    latent_shape: tuple[int, ...]
    device: torch.device
    budget: float
    keep: int
    batch_size: int
    seed: int
    collect_pairs: bool = False
    trace: list[Check] = field(default_factory=list)
    pairs: list[SearchPair] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Denoising steps of a sample."""
        return len(self.sampler)

    @property
    def lookahead(self) -> int:
        """Denoiser calls that scoring a state takes: 0, or 1 for rewards that need its predicted clean latent."""
        return int(self.judge.needs_prediction)

    def noise_level(self, index: int) -> float | None:
        """Level of the states before step ``index``; ``None`` for clean latents."""
        return None if index == self.steps else float(self.sampler.levels[index])

    # --- the five moves ------------------------------------------------------------------------------------------

    def draw(self, streams: Sequence[int], prompts: Sequence[int] | None = None) -> Particles:
        """Fresh initial latents: every stream for every prompt."""
        numbers = range(len(self.prompts)) if prompts is None else prompts
        rows = [(number, stream) for number in numbers for stream in streams]
        noise = self.noise(Stream.INITIAL_LATENTS, rows)
        latents = noise.to(self.device, self.generator.storage_dtype)
        return Particles(latents, [p for p, _ in rows], [s for _, s in rows], 0, [NO_PARENT] * len(rows))

    def look(self, particles: Particles) -> Particles:
        """The same rows with the denoiser's prediction at their states; rows that have one are not asked again."""
        if particles.prediction is not None:
            return particles
        timestep = self.sampler.timesteps[particles.index]
        with torch.no_grad():
            predictions = [
                self.bind(part)(part.latents, timestep.expand(len(part))) for part in particles.chunks(self.batch_size)
            ]
        return replace(particles, prediction=torch.cat(predictions))

    def advance(
        self, particles: Particles, stop: int, stochastic: Sequence[int] = (), bend: Bend | None = None
    ) -> Particles:
        """The same rows further on, before step ``stop``.

        Args:
            particles: where they are.
            stop: the number of steps for clean latents.
            stochastic: steps that are stochastic; the others are deterministic.
            bend: alters the denoiser's predictions.
        """
        if stop == particles.index:
            return particles
        moved = [self._advance(part, stop, stochastic, bend) for part in particles.chunks(self.batch_size)]
        return replace(particles, latents=torch.cat(moved), index=stop, prediction=None)

    def score(self, particles: Particles) -> tuple[Particles, Tensor]:
        """Scores rows and enters them into the trace, all as kept.

        Returns:
            The rows, which have now this check's nodes as parents, and their scores, shape ``(rows,)``, on the CPU.
        """
        level = self.noise_level(particles.index)
        if level is not None and self.judge.needs_prediction:
            particles = self.look(particles)
        scores = torch.cat([self._score(part, level) for part in particles.chunks(self.batch_size)])
        first = self.trace[-1].nodes.stop if self.trace else 0
        check = Check(
            first=first,
            step=particles.index,
            noise_level=0.0 if level is None else level,
            prompt=particles.prompt,
            parent=particles.parent,
            scores=scores,
            kept=list(range(len(particles))),
        )
        self.trace.append(check)
        return replace(particles, parent=list(check.nodes)), scores

    def retain(
        self, particles: Particles, scores: Tensor, rows: Sequence[int], streams: Sequence[int] | None = None
    ) -> Particles:
        """Rows that go on, of those that were scored last, as in `Particles.take`; the others are given up."""
        self.note(kept=list(rows))
        self._collect(particles, scores, rows)
        return particles.take(rows, streams)

    def finish(self, particles: Particles, scores: Tensor) -> tuple[Particles, Tensor]:
        """The best of scored clean latents, `keep` of each prompt, with their scores.

        Pairs are made of the better half of each prompt's rows against the worse half.
        """
        half = [row for rows in rows_of(particles.prompt).values() for row in _better_half(scores, rows)]
        self._collect(particles, scores, half)
        rows = best_rows(scores, particles.prompt, self.keep)
        chosen = {particles.parent[row] for row in rows}
        for place, check in enumerate(self.trace):
            if check.step == self.steps:
                kept = [node - check.first for node in check.nodes if node in chosen]
                self.trace[place] = replace(check, kept=kept)
        return particles.take(rows), scores[rows]

    def note(self, **facts: Any) -> None:
        """Changes facts of the last check."""
        self.trace[-1] = replace(self.trace[-1], **facts)

    # --- noise ---------------------------------------------------------------------------------------------------

    def noise(self, purpose: Stream, rows: Sequence[tuple[int, ...]], *parts: int) -> Tensor:
        """Standard normal noise, float32, on the CPU; a row depends on its integers and ``parts`` alone."""
        return noise_by_row([fold_seed(self.seed, purpose, *row, *parts) for row in rows], self.latent_shape)

    def renoise(self, particles: Particles, index: int, number: int) -> Particles:
        """Rows back at an earlier, noisier step ``index``, by the forward process with fresh noise.

        ``x' = a x + b eps`` with ``a = signal' / signal`` and ``b = sqrt(level'^2 - (a level)^2)``: exact for flow matching
        and for variance-preserving models.

        Args:
            number: of the round; each has noise of its own.
        """
        rows = list(zip(particles.prompt, particles.stream, strict=True))
        noise = self.noise(Stream.SEARCH, rows, number).to(self.device)
        now, then = self.sampler.levels[particles.index], self.sampler.levels[index]
        shrink = self.process.signal(then) / self.process.signal(now)
        fresh = (then**2 - (shrink * now) ** 2).clamp(min=0).sqrt()
        latents = shrink * particles.latents.float() + fresh * noise
        return replace(particles, latents=latents.to(particles.latents.dtype), index=index, prediction=None)

    # --- inside --------------------------------------------------------------------------------------------------

    @cached_property
    def process(self) -> NoiseProcess:
        """The noise process of the model."""
        return self.generator.family.noise_process(self.generator.pipeline.scheduler.config)

    @cached_property
    def _conditioning(self) -> Conditioning:
        return self.generator.encode(self.prompts, self.device)

    @cached_property
    def _negative(self) -> Conditioning | None:
        return self.generator.encode_negative(self.device)

    def conditioning_of(self, particles: Particles) -> Conditioning:
        """Encoded prompts, one row per particle."""
        return self._conditioning[particles.prompt]

    def texts_of(self, particles: Particles) -> list[str]:
        """Prompts, one per particle."""
        return [self.prompts[number] for number in particles.prompt]

    def facts_of(self, particles: Particles) -> tuple[list[str], Conditioning, list[int]]:
        """What rewards are told besides the latents: prompts, encoded prompts and noise seeds, one per particle."""
        return self.texts_of(particles), self.conditioning_of(particles), self.reward_seeds(particles)

    def reward_seeds(self, particles: Particles) -> list[int]:
        """Seeds of the reward's own noise: one per prompt, so that it cancels in comparisons."""
        return [fold_seed(self.seed, Stream.REWARD_NOISE, number) for number in particles.prompt]

    def bind(self, particles: Particles) -> PredictFunction:
        """The denoiser for the prompts of these rows."""
        return self.generator.bind(self.conditioning_of(particles), self._negative)

    def _collect(self, particles: Particles, scores: Tensor, rows: Sequence[int]) -> None:
        if self.collect_pairs:
            level = self.noise_level(particles.index)
            self.pairs += pairs_of(particles, scores, set(rows), self.prompts, level, self.judge)

    def _advance(self, part: Particles, stop: int, stochastic: Sequence[int], bend: Bend | None) -> Tensor:
        predict = self.bind(part)
        if part.prediction is not None:
            predict = _known_first(part.prediction, predict)
        if bend is not None:
            predict = bend(predict, part)
        steps = [index for index in stochastic if part.index <= index < stop]
        rows = list(zip(part.prompt, part.stream, strict=True))
        noise = [self.noise(Stream.STEP_NOISE, rows, index) for index in steps]
        return sample(
            predict,
            part.latents,
            self.sampler,
            start=part.index,
            stop=stop,
            stochastic=steps,
            trained=(),
            step_noise=torch.stack(noise, dim=1).to(self.device) if noise else None,
        ).latents

    def _score(self, part: Particles, level: float | None) -> Tensor:
        facts = self.facts_of(part)
        if level is None:
            return self.judge.clean(part.latents, *facts)
        clean = None
        if part.prediction is not None:
            clean = self.sampler.predict_clean(part.index, part.latents, part.prediction).to(part.latents.dtype)
        return self.judge.states(part.latents, level, *facts, clean=clean)


def _known_first(prediction: Tensor, predict: PredictFunction) -> PredictFunction:
    """A denoiser whose first answer is known."""
    known = [prediction]

    def answer(latents: Tensor, timestep: Tensor) -> Tensor:
        return known.pop() if known else predict(latents, timestep)

    return answer


def _better_half(scores: Tensor, rows: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: -float(scores[row]))[: len(rows) // 2]
