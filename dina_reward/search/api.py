"""`search`: one call for every method, on any supported pipeline, with any rewards."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import nn

from dina_reward.alignment.generator import Generator
from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.alignment.sampling.steps import SDEType
from dina_reward.backbones.wrappers import check_not_offloaded
from dina_reward.checks.values import (
    check_choice,
    check_flags,
    check_number,
    checked_int,
    checked_texts,
    is_int,
    is_real,
)
from dina_reward.noise import is_flow_matching
from dina_reward.reward import LatentReward
from dina_reward.reward_functions import RewardFunction, callable_name, unwrapped
from dina_reward.search.best_of_n import BestOfN, Halving
from dina_reward.search.gradient import Guidance, NoiseOptimization
from dina_reward.search.judge import Judge, ScoredAs
from dina_reward.search.method import SearchMethod
from dina_reward.search.noise_search import PathSearch, ZeroOrder
from dina_reward.search.result import SearchResult
from dina_reward.search.run import SearchRun
from dina_reward.search.steering import FKSteering
from dina_reward.search.stepwise import Stepwise


METHODS: dict[str, type[SearchMethod]] = {
    method.name: method
    for method in (BestOfN, Halving, FKSteering, Stepwise, ZeroOrder, PathSearch, Guidance, NoiseOptimization)
}
"""The methods by name; each is a dataclass of its settings."""

FLOW_ETA, DDIM_ETA = 0.7, 1.0
_LARGEST_BUDGET = 1_000_000
_MOST_STEPS = 10_000
_LARGEST_ETA = 1000.0


def search(
    pipeline: Any,
    reward: RewardFunction | Sequence[RewardFunction],
    prompts: str | Sequence[str],
    *,
    method: str | SearchMethod = "stepwise",
    budget: float = 8,
    keep: int = 1,
    reward_weights: Sequence[float] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    num_frames: int = 1,
    max_sequence_length: int | None = None,
    sde_type: SDEType | None = None,
    eta: float | None = None,
    reward_noise_level: float | Sequence[float] | None = None,
    reward_ensemble: str = "tokens",
    reward_num_noise_samples: int = 1,
    score_as: ScoredAs = "state",
    batch_size: int = 8,
    seed: int = 0,
    return_pairs: bool = False,
    **options: Any,
) -> SearchResult:
    """Samples prompts and spends a budget of denoiser calls on samples that a reward likes better. Nothing is trained.

    Examples:
        >>> result = search(pipe, reward, ["a cat", "a dog"], budget=8, num_inference_steps=28)
        >>> result.latents  # (2, ...), the best found for each prompt
        >>> result.scores, result.denoiser_calls, result.lineage(0)
        >>> images = result.images()  # decoded now, and not before

    Args:
        pipeline: a diffusers pipeline of a supported family; it is not altered, and its scheduler's state is not read.
        reward: a `LatentReward`, any callable on ``latents`` or ``images``, or a list of them, as in the trainers.
        prompts: one or several; all are searched together, each on its own.
        method: a name (``best_of_n``, ``halving``, ``fk``, ``stepwise``, ``zero_order``, ``paths``, ``guidance``,
            ``noise_optimization``), or an instance with settings. The default finds the most per denoiser call, and asks the
            reward about several states per call; ``halving`` asks it least.
        budget: denoiser calls per prompt, in whole samples: 8 allows as many as eight plain samples take.
        keep: samples to return per prompt.
        reward_weights: one per reward; all 1 by default.
        num_inference_steps: denoising steps of a sample; that of the pipeline's own call by default.
        guidance_scale: classifier-free guidance above 1, which takes two denoiser calls per step.
        height, width: in pixels; by default those of the pipeline where it has any.
        num_frames: of a video.
        max_sequence_length: length that prompts are encoded to; the pipeline's by default.
        sde_type, eta: stochastic steps of the methods that take them (``fk``, ``stepwise``): by default ``flow_sde`` with
            0.7 for flow matching, ``ddim`` with 1 for DDPM models.
        reward_noise_level, reward_ensemble, reward_num_noise_samples: how a `LatentReward` scores clean latents; by default
            at the checkpoint's own level(s).
        score_as: ``"state"``: a `LatentReward` scores states on the way as they are, at their own levels; ``"clean"``: it
            scores the clean latents that the denoiser predicts there.
        batch_size: rows per pass of denoiser, reward and decoder; bounds memory and does not change results.
        seed: of all draws.
        return_pairs: keep the latents of chosen and rejected rows as preference pairs.
        options: settings of the method, where it is given by name.

    Returns:
        `SearchResult`.

    Raises:
        ValueError: a pipeline that cannot be stepped (offloaded, of an unsupported family or scheduler), a reward of another
            family, no prompts, a budget below 1 or too small for the method, unknown methods or options, ``eta=0`` where
            steps have to be stochastic.
        RewardError: a reward that is not optional failed.
    """
    chosen = method_of(method, options)
    texts = checked_texts("prompts", prompts)
    _check_numbers(budget, keep, batch_size)
    checked_int("seed", seed, 0, 2**64 - 1)
    check_flags(return_pairs=return_pairs)
    generator = Generator(pipeline, guidance_scale=guidance_scale, max_sequence_length=max_sequence_length)
    check_steppable(pipeline)
    settings: dict[str, Any] = {"ensemble": reward_ensemble, "num_noise_samples": reward_num_noise_samples}
    if reward_noise_level is not None:
        settings["noise_level"] = reward_noise_level
    judge = Judge(generator, reward, weights=reward_weights, settings=settings, score_as=score_as)
    _check_family(judge, generator)
    shape = generator.latent_shape(*image_size(pipeline, generator, height, width), num_frames)
    steps = default_steps(pipeline) if num_inference_steps is None else num_inference_steps
    device = next(generator.denoiser.parameters()).device
    run = SearchRun(
        generator=generator,
        judge=judge,
        sampler=sampler_of(generator, chosen, steps, shape, sde_type=sde_type, eta=eta, device=device),
        prompts=texts,
        latent_shape=shape,
        device=device,
        budget=float(budget),
        keep=keep,
        batch_size=batch_size,
        seed=seed,
        collect_pairs=return_pairs,
    )
    return carry_out(chosen, run)


def carry_out(method: SearchMethod, run: SearchRun) -> SearchResult:
    """Runs a method on a run that nothing has been drawn for yet.

    Raises:
        ValueError: no reward applies to any sample.
    """
    started = time.perf_counter()
    particles, scores = method.run(run)
    if bool(torch.isneginf(scores).all()):
        raise ValueError(
            "the rewards apply to none of the samples: they returned None or NaN for every one, which leaves nothing to "
            "choose by"
        )
    return SearchResult(
        latents=particles.latents,
        prompts=run.texts_of(particles),
        scores=scores,
        trace=run.trace,
        nodes=particles.parent,
        method=method,
        budget=run.budget,
        num_inference_steps=run.steps,
        seconds=time.perf_counter() - started,
        generator=run.generator,
        batch_size=run.batch_size,
        pairs=run.pairs,
    )


def method_of(method: str | SearchMethod, options: dict[str, Any]) -> SearchMethod:
    """The method of this name with its options, or the one given.

    Raises:
        ValueError: no such method or option, or options besides an instance.
    """
    if isinstance(method, SearchMethod):
        if options:
            raise ValueError(f"{sorted(options)} are given besides a {type(method).__name__}; set them in it")
        return method
    check_choice("method", method, tuple(METHODS))
    known = [field.name for field in fields(METHODS[method])]  # type: ignore[arg-type]
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise ValueError(f"{method} has no option {unknown[0]!r}; it takes {', '.join(known)}")
    return METHODS[method](**options)


def check_steppable(pipeline: Any) -> None:
    """Refuses pipelines whose parts are elsewhere until they run, which a loop of our own cannot step.

    Raises:
        ValueError: naming the part that is offloaded.
    """
    for name, part in pipeline.components.items():
        if not isinstance(part, nn.Module):
            continue
        check_not_offloaded(part)
        hook = getattr(part, "_hf_hook", None)
        if hook is not None and (getattr(hook, "offload", False) or "Offload" in type(hook).__name__):
            raise ValueError(
                f"the pipeline's {name} is offloaded (enable_model_cpu_offload or a device_map), so it is on its device "
                "only while the pipeline itself runs it; load the pipeline without offloading, or use SearchCallback in the "
                "pipeline's own call"
            )


def image_size(pipeline: Any, generator: Generator, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels; what is not given is the pipeline's own.

    Raises:
        ValueError: the pipeline has none.
    """
    if height is None or width is None:
        config: Any = generator.denoiser.config
        side = getattr(pipeline, "default_sample_size", None) or config.get("sample_size")
        if not is_int(side):
            raise ValueError(f"{type(pipeline).__name__} states no size of its own; give height and width in pixels")
        own = int(side) * int(pipeline.vae_scale_factor)
        return own if height is None else height, own if width is None else width
    return height, width


def default_steps(pipeline: Any) -> int:
    """Denoising steps of the pipeline's own call."""
    return int(inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default)


def sampler_of(
    generator: Generator,
    method: SearchMethod,
    steps: int,
    shape: Sequence[int],
    *,
    sde_type: SDEType | None = None,
    eta: float | None = None,
    device: torch.device | str = "cpu",
) -> Sampler:
    """Sampler with the steps that a method takes: deterministic ones, or stochastic ones too; arguments as of `search`.

    Raises:
        ValueError: the steps do not fit the method or the scheduler.
    """
    flow = is_flow_matching(generator.pipeline.scheduler.config)
    checked_int("num_inference_steps", steps, 1, _MOST_STEPS)
    if eta is not None:
        check_number("eta", eta, 0.0, _LARGEST_ETA)
    if sde_type is not None:
        check_choice("sde_type", sde_type, get_args(SDEType))
    if not method.needs_noise:
        if eta or sde_type is not None:
            raise ValueError(f"{method.name} takes deterministic steps; leave eta and sde_type away")
        return generator.sampler(steps, shape, device=device)
    if eta is not None and not eta > 0:
        raise ValueError(
            f"eta is {eta}, but {method.name} needs stochastic steps, or successors of a state would all be the same; leave "
            "eta away for the default, or use halving, which needs none"
        )
    if steps < 2:
        raise ValueError(
            f"{method.name} needs at least two denoising steps, of which the last is deterministic, got {steps}; use "
            "best_of_n"
        )
    kind = sde_type or ("flow_sde" if flow else "ddim")
    return generator.sampler(steps, shape, sde_type=kind, eta=eta or (FLOW_ETA if flow else DDIM_ETA), device=device)


def _check_numbers(budget: Any, keep: Any, batch_size: Any) -> None:
    if not is_real(budget) or not 1 <= budget <= _LARGEST_BUDGET:
        raise ValueError(
            f"budget must be a number of samples of at least 1 and at most {_LARGEST_BUDGET}, got {budget!r:.80}; one "
            "sample costs 1"
        )
    checked_int("keep", keep, 1)
    checked_int("batch_size", batch_size, 1)


def _check_family(judge: Judge, generator: Generator) -> None:
    for function in judge.functions:
        reward = unwrapped(function)
        if isinstance(reward, LatentReward) and reward.family.name != generator.family.name:
            raise ValueError(
                f"{callable_name(function)} reads latents of {reward.family.name} and the pipeline makes those of "
                f"{generator.family.name}; load a reward of the pipeline's own family"
            )
