"""Gradients of the reward at inference: guidance of the sampler's predictions, and optimisation of the initial noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dina_reward.alignment.sampling.rollout import PredictFunction
from dina_reward.alignment.sampling.seeding import Stream, generator_from
from dina_reward.alignment.trainers.backprop import GradientPlan, sample_with_gradient
from dina_reward.checks.values import check_choice, check_fields
from dina_reward.noise import expand_as
from dina_reward.search.method import SearchMethod, affordable, check_keep
from dina_reward.search.particles import Particles
from dina_reward.search.run import SearchRun


Target = Literal["state", "clean"]
Regularizer = Literal["norm", "moments"]


@dataclass(frozen=True)
class Guidance(SearchMethod):
    """Guides every step of a window by the gradient of the reward, and returns the best of the budget's samples.

    Tilting the data by ``exp(l r)`` moves the score by ``l g``, hence the predicted clean latent by ``l level^2 / signal g``
    (Tweedie): ``v' = v - l s / (1 - s) g`` for flow matching, ``eps' = eps - l level g`` for epsilon models. With
    ``target="state"`` ``g`` is the gradient of the reward of the noisy state at its own level: one backward pass through the
    reward, none through the denoiser, no decoder. With ``target="clean"`` it is that of the reward of the predicted clean
    latent, through the denoiser (universal guidance, arXiv 2302.07121), for any differentiable reward on latents.

    Args:
        strength (`float`): ``l``, in units of calibrated preference; see `Judge.unit`.
        target (`str`): see above.
        max_shift (`float`): the prediction moves by at most this share of its own norm, per sample.
        window (`tuple[float, float]`): lowest and highest noise level at which to guide.
    """

    name = "guidance"

    strength: float = 5.0
    target: Target = "state"
    max_shift: float = 0.2
    window: tuple[float, ...] = (0.1, 0.95)

    def __post_init__(self) -> None:
        check_fields(self, strength=(0, 1e6), max_shift=(0, 1e6), window=(0, 1))
        check_choice("target", self.target, get_args(Target))
        if len(self.window) != 2 or not self.window[0] < self.window[1]:
            raise ValueError(f"window must be two increasing noise levels, such as (0.1, 0.95), got {self.window}")

    def run(self, run: SearchRun) -> tuple[Particles, Tensor]:
        count = int(run.budget)
        check_keep(count, run.keep, self.name)

        def bend(predict: PredictFunction, part: Particles) -> PredictFunction:
            return _Guided(self, run, predict, part)

        particles, scores = run.score(run.advance(run.draw(range(count)), run.steps, bend=bend))
        return run.finish(particles, scores)


class _Guided:
    """A denoiser whose predictions are moved by the gradient of the reward, step after step.

    Args:
        settings, run: of the search.
        predict: the denoiser, with prompts bound.
        part: its rows, before the first step.
    """

    def __init__(self, settings: Guidance, run: SearchRun, predict: PredictFunction, part: Particles) -> None:
        self.settings, self.run, self.predict, self.part = settings, run, predict, part
        self.index = part.index

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        index, sampler = self.index, self.run.sampler
        self.index += 1
        level = float(sampler.levels[index])
        low, high = self.settings.window
        if not low <= level <= high:
            return self.predict(latents, timestep)
        if self.settings.target == "state":
            prediction = self.predict(latents, timestep)
            gradient = self._state_gradient(latents, level)
        else:
            prediction, gradient = self._clean_gradient(latents, timestep, index)
        signal = float(self.run.process.signal(torch.tensor(level)))
        scale = self.settings.strength / self.run.judge.unit(level if self.settings.target == "state" else None)
        moved = sampler.move_clean(index, prediction, scale * level**2 / signal * gradient.float())
        return capped(prediction, moved, self.settings.max_shift)

    @torch.enable_grad()
    def _state_gradient(self, latents: Tensor, level: float) -> Tensor:
        states = latents.detach().requires_grad_()
        scores = self.run.judge.differentiable_states(states, level, self.run.texts_of(self.part))
        return torch.autograd.grad(scores.sum(), states)[0]

    @torch.enable_grad()
    def _clean_gradient(self, latents: Tensor, timestep: Tensor, index: int) -> tuple[Tensor, Tensor]:
        states = latents.detach().requires_grad_()
        prediction = self.predict(states, timestep)
        clean = self.run.sampler.predict_clean(index, states, prediction)
        scores = self.run.judge.differentiable_clean(clean, *self.run.facts_of(self.part))
        return prediction.detach(), torch.autograd.grad(scores.sum(), states)[0]


def capped(prediction: Tensor, moved: Tensor, share: float) -> Tensor:
    """A moved prediction, brought back along the line where it moved by more than a share of its norm, per row."""
    shift = moved - prediction
    norms = [values.flatten(start_dim=1).norm(dim=1) for values in (prediction, shift)]
    factor = (share * norms[0] / norms[1].clamp(min=1e-12)).clamp(max=1)
    return prediction + expand_as(factor, shift) * shift


@dataclass(frozen=True)
class NoiseOptimization(SearchMethod):
    """Gradient ascent on the initial latent through the whole sampler (ReNO, arXiv 2406.04312; DNO, arXiv 2405.18881).

    Every iteration samples, scores the clean latent, and steps along the gradient of the reward minus the regulariser, which
    keeps the noise typical; the best iterate by reward is returned. The budget sets the iterations. An iteration counts the
    denoiser calls of one sample; its backward passes, about twice as dear, and the memory of the whole trajectory come
    on top.

    | regulariser | of the noise ``z`` with ``d`` elements |
    |---|---|
    | ``norm`` (ReNO) | ``|z|^2 / 2 - (d - 1) log |z|``, least at the norm of noise |
    | ``moments`` (DNO) | ``-log p`` of mean and covariance of blocks of ``z``, in order and permuted |

    Args:
        learning_rate, momentum (`float`): of SGD with Nesterov momentum.
        max_grad_norm (`float`): the gradient of each sample is clipped to this norm.
        regularizer (`str`): see above.
        regularization (`float`): its weight.
    """

    name = "noise_optimization"

    learning_rate: float = 5.0
    momentum: float = 0.9
    max_grad_norm: float = 0.1
    regularizer: Regularizer = "norm"
    regularization: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self, learning_rate=(0, 1e6), momentum=(0, 1), max_grad_norm=(0, 1e6), regularization=(0, 1e6))
        check_choice("regularizer", self.regularizer, get_args(Regularizer))

    def run(self, run: SearchRun) -> tuple[Particles, Tensor]:
        iterations = affordable(run.budget, 1, "one iteration", "raise budget")
        check_keep(1, run.keep, self.name)
        best = [self._optimise(run, part, iterations) for part in run.draw([0]).chunks(run.batch_size)]
        particles, scores = run.score(Particles.cat(best))
        return run.finish(particles, scores)

    @torch.enable_grad()
    def _optimise(self, run: SearchRun, part: Particles, iterations: int) -> Particles:
        predict, facts = run.bind(part), run.facts_of(part)
        plan = GradientPlan(tuple(range(run.steps)), stop=run.steps - 1)
        noise, velocity = part.latents.float(), torch.zeros_like(part.latents, dtype=torch.float32)
        best, best_scores = part.latents, torch.full((len(part),), -torch.inf, device=run.device)
        for number in range(iterations):
            leaf = noise.detach().requires_grad_()
            sample = sample_with_gradient(predict, leaf.to(part.latents.dtype), run.sampler, plan).latents
            scores = run.judge.differentiable_clean(sample, *facts)
            better = scores.detach() > best_scores
            best = torch.where(expand_as(better, sample), sample.detach().to(best.dtype), best)
            best_scores = torch.where(better, scores.detach(), best_scores)
            if number == iterations - 1:
                break
            objective = scores - self.regularization * self._penalty(run, leaf, number)
            (gradient,) = torch.autograd.grad(objective.sum(), leaf)
            clip = (self.max_grad_norm / gradient.flatten(start_dim=1).norm(dim=1).clamp(min=1e-12)).clamp(max=1)
            gradient = expand_as(clip, gradient) * gradient
            velocity = self.momentum * velocity + gradient
            noise = noise + self.learning_rate * (gradient + self.momentum * velocity)
        return replace(part, latents=best, index=run.steps)

    def _penalty(self, run: SearchRun, noise: Tensor, number: int) -> Tensor:
        if self.regularizer == "norm":
            return norm_penalty(noise)
        return moment_penalty(noise, generator_from(run.seed, Stream.SEARCH, number))


def norm_penalty(noise: Tensor) -> Tensor:
    """``|z|^2 / 2 - (d - 1) log |z|`` per row: minus the log-density of the norm of Gaussian noise, up to a constant."""
    norm = noise.flatten(start_dim=1).norm(dim=1)
    return norm.square() / 2 - (noise[0].numel() - 1) * norm.log()


def moment_penalty(noise: Tensor, generator: torch.Generator, block: int = 4, permutations: int = 16) -> Tensor:
    """DNO's regulariser (arXiv 2405.18881) per row: ``-log p_mean - log p_cov`` of the noise cut into blocks.

    With ``m`` blocks of ``k`` elements, ``log p_mean = -m |mean|^2 / (2 k)`` and
    ``log p_cov = -m max(sqrt(1 + M) - 1 - sqrt(k / m), 0)^2 / 2`` with ``M`` the spectral norm of covariance minus identity;
    each counts only below ``-log 2``, where noise is not typical. Averaged over the given order and random ones.

    Args:
        noise: shape ``(rows, ...)``.
        generator: of the permutations, on the CPU.
        block: ``k``.
        permutations: random orders besides the given one.
    """
    flat = noise.flatten(start_dim=1)
    count = flat.shape[1] // block
    orders = [
        torch.arange(flat.shape[1]),
        *(torch.randperm(flat.shape[1], generator=generator) for _ in range(permutations)),
    ]
    penalties = []
    for order in orders:
        blocks = flat[:, order[: count * block].to(flat.device)].view(len(flat), count, block)
        mean = -count * blocks.mean(dim=1).square().sum(dim=1) / (2 * block)
        covariance = blocks.mT @ blocks / count - torch.eye(block, device=flat.device)
        spectral = torch.linalg.matrix_norm(covariance, ord=2)
        excess = ((1 + spectral).sqrt() - 1 - math.sqrt(block / count)).clamp(min=0)
        spread = -count * excess.square() / 2
        penalties.append(-mean.clamp(max=-math.log(2)) - spread.clamp(max=-math.log(2)))
    return torch.stack(penalties).mean(dim=0)
