"""One job of the comparison of search methods on the embedded world: one generator, one seed, every method and budget.

`recipes/compare_search.py` runs all of them and tabulates; one is
``python -m dina_reward.shapes.search_comparison flow --seed 0 --output outputs/search``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.experience.diversity import diversity
from dina_reward.alignment.policy_weights import LORA_WEIGHTS_NAME
from dina_reward.evaluation.cost import peak_memory, reset_peak_memory
from dina_reward.noise.draws import fold_seed
from dina_reward.search import (
    BestOfN,
    FKSteering,
    Guidance,
    Halving,
    NoiseOptimization,
    PathSearch,
    SearchMethod,
    SearchResult,
    Stepwise,
    ZeroOrder,
    search,
)
from dina_reward.shapes.alignment import WHOLE_GROUPS, align, held_out_prompts
from dina_reward.shapes.jobs import write_result
from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.pixel_reward import PixelReward
from dina_reward.shapes.shipped import load_pipeline, load_reward
from dina_reward.shapes.text import MAX_PROMPT_TOKENS


GENERATORS = ("flow", "ddpm", "aligned")
"""The shipped generators, and the flow-matching one after an alignment with its reward."""

BUDGETS = (4, 8, 16, 32)
"""Denoiser calls per prompt, in whole samples."""

POOL_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Sizes that the curve of best-of-N is read at, besides that of the pool itself."""

STEPS, COPIES, BATCH_SIZE = 10, 2, 96
"""Denoising steps; searches per prompt, whose distance is the diversity; rows per pass."""

EARLY = "halving of 8"
"""Successive halving among eight samples, whatever the budget: to be compared with the best of eight."""

EARLY_SEARCHES = 8
"""Searches of every prompt that it is averaged over; best-of-N is read from a pool, and so hardly depends on the draw."""

METHODS: Mapping[str, SearchMethod] = {
    "halving": Halving(),
    "fk": FKSteering(),
    "stepwise": Stepwise(),
    "zero_order": ZeroOrder(neighbours=2),
    "paths": PathSearch(),
    "guidance": Guidance(),
}

DEAR: Mapping[str, SearchMethod] = {"noise_optimization": NoiseOptimization()}
"""Methods whose backward passes cost more than the calls that are counted; they run at the two smallest budgets."""

VARIANTS: Mapping[str, SearchMethod] = {
    "halving (.2, .4, .6)": Halving(checks=(0.2, 0.4, 0.6)),
    "halving (.3, .5)": Halving(checks=(0.3, 0.5)),
    "halving (.4, .5, .6)": Halving(checks=(0.4, 0.5, 0.6)),
    "halving (.5, .6, .7)": Halving(checks=(0.5, 0.6, 0.7)),
    "halving (.6), a quarter": Halving(checks=(0.6,), survivors=0.25),
    "fk, strength 1": FKSteering(strength=1.0),
    "fk, strength 10": FKSteering(strength=10.0),
    "fk, max": FKSteering(potential="max"),
    "zero_order, judged at .6": ZeroOrder(neighbours=2, judged_at=0.6),
    "zero_order, similarity .7": ZeroOrder(neighbours=2, similarity=0.7),
    "stepwise, 2 branches": Stepwise(branches=2),
    "stepwise, 8 branches": Stepwise(branches=8),
    "stepwise, (.2, .8)": Stepwise(window=(0.2, 0.8)),
    "stepwise, blocks of 2": Stepwise(block=2),
    "guidance, strength 1": Guidance(strength=1.0),
    "guidance, strength 20": Guidance(strength=20.0),
    "guidance, shift .1": Guidance(max_shift=0.1),
    "guidance, shift .4": Guidance(max_shift=0.4),
}
"""Other settings, at one budget and on a seed of their own: what the defaults were chosen from."""

VARIANT_BUDGET, VARIANT_SEED = 8, 100


class Bench:
    """A generator, its latent reward, the prompts and the oracle.

    Args:
        generator: one of `GENERATORS`.
        prompts: different prompts; each is searched `COPIES` times.
        lora (`Path`, *optional*): directory of the LoRA of the aligned generator.
        pixel_reward (`Path`, *optional*): directory of a pixel reward, as `recipes/compare_pixel_reward.py` trains it.
    """

    def __init__(
        self, generator: str, prompts: int, lora: Path | None = None, pixel_reward: Path | None = None
    ) -> None:
        world = "ddpm" if generator == "ddpm" else "flow"
        self.pipeline = load_pipeline(world)
        if lora is not None:
            self.pipeline.load_lora_weights(str(lora), weight_name=LORA_WEIGHTS_NAME)
        self.reward = load_reward(world, pipeline=self.pipeline, share_backbone=True)
        self.pixel: Any = None
        if pixel_reward is not None and world == "flow":
            reward = PixelReward.from_pretrained(pixel_reward, self.pipeline)
            self.pixel = lambda images, prompts: reward(images, prompts)
        self.prompts = held_out_prompts()[:prompts] * COPIES
        self.oracle = Oracle()

    def measure(self, method: SearchMethod, budget: float, seed: int, *, pixels: bool = False) -> dict[str, Any]:
        """What a method finds at a budget, and what that takes."""
        reset_peak_memory()
        started, before = time.process_time(), peak_memory()[0]
        result = self.search(method, budget, seed, pixels=pixels)
        seconds = time.process_time() - started
        facts = self.judged(result)
        facts |= {name: getattr(result, name) / len(self.prompts) for name in ("denoiser_calls", "reward_calls")}
        facts["decoder_calls"] = result.decoder_calls / len(self.prompts) - 1  # the oracle looks at one
        memory = max(0, peak_memory()[0] - before) / 2**20
        return {**facts, "cpu_seconds": seconds / len(self.prompts), "peak_memory_mb": memory}

    def search(
        self, method: SearchMethod, budget: float, seed: int, *, keep: int = 1, pixels: bool = False
    ) -> SearchResult:
        """One search of all prompts."""
        return search(
            self.pipeline,
            self.pixel if pixels else self.reward,
            self.prompts,
            method=method,
            budget=budget,
            keep=keep,
            num_inference_steps=STEPS,
            max_sequence_length=MAX_PROMPT_TOKENS,
            batch_size=BATCH_SIZE,
            seed=seed,
        )

    def judged(self, result: SearchResult) -> dict[str, Any]:
        """The oracle's view of one sample per prompt, and how far apart the copies of a prompt are."""
        scores = self.oracle(result.images(), result.prompts)
        different = list(dict.fromkeys(self.prompts))
        groups = [different.index(prompt) for prompt in result.prompts]
        return {
            "fit": float(scores.fit.mean()),
            "fit_error": float(scores.fit.std() / math.sqrt(len(scores.fit))),
            "cleanness": float(scores.cleanness.mean()),
            "score": float(result.scores.mean()),
            "diversity": diversity(result.latents, groups),
        }

    def pool(self, size: int, seed: int) -> dict[str, Any]:
        """Best of ``n`` for every ``n`` up to a size, from one pool of samples: what is expected of each."""
        reset_peak_memory()
        started, before = time.process_time(), peak_memory()[0]
        result = self.search(BestOfN(), size, seed, keep=size)
        seconds = time.process_time() - started
        oracle = self.oracle(result.images(), result.prompts)
        shape = (len(self.prompts), size)
        scores = result.scores.view(shape)
        columns = {"fit": oracle.fit, "cleanness": oracle.cleanness, "score": result.scores}
        sizes = sorted({count for count in (*POOL_SIZES, size) if count <= size})
        return {
            "sizes": sizes,
            **{
                name: [float(expected_best(scores, values.view(shape), count).mean()) for count in sizes]
                for name, values in columns.items()
            },
            "fit_error": [
                float(expected_best(scores, oracle.fit.view(shape), count).std() / math.sqrt(shape[0]))
                for count in sizes
            ],
            "cpu_seconds_per_sample": seconds / (shape[0] * size),
            "peak_memory_mb": max(0, peak_memory()[0] - before) / 2**20,
        }


def expected_best(scores: Tensor, values: Tensor, count: int) -> Tensor:
    """Expected value of the highest-scored of ``count`` samples drawn from a pool without replacement.

    ``sum_i C(i - 1, n - 1) / C(N, n) value_(i)`` with samples in ascending order of their scores, unbiased.

    Args:
        scores, values (`Tensor`): shape ``(prompts, pool)``.
        count: ``n``, at most the size of the pool.

    Returns:
        `Tensor`: shape ``(prompts,)``, float64.
    """
    size = scores.shape[1]
    ordered = values.double().gather(1, scores.argsort(dim=1))
    weights = [math.comb(place, count - 1) / math.comb(size, count) for place in range(size)]
    return ordered @ torch.tensor(weights, dtype=torch.float64)


def run_job(
    generator: str,
    seed: int,
    output: Path,
    *,
    prompts: int,
    budgets: Sequence[int] = BUDGETS,
    pool: int = 64,
    pixel_reward: Path | None = None,
) -> None:
    """All methods at all budgets; figures go to ``GENERATOR/seed-N``. The aligned generator gets the main methods alone."""
    aligned = generator == "aligned"
    bench = Bench(generator, prompts, output / "alignment" if aligned else None, pixel_reward)
    result: dict[str, Any] = {"generator": generator, "seed": seed, "prompts": len(bench.prompts)}
    result["pool"] = bench.pool(min(pool, max(budgets)) if aligned else pool, seed)
    result[EARLY] = early(bench, seed)
    runs: dict[str, dict[str, Any]] = {}
    for name, method in METHODS.items():
        if aligned and name not in ("halving", "stepwise"):
            continue
        runs[name] = {str(budget): bench.measure(method, budget, seed) for budget in budgets}
    if not aligned:
        for name, method in DEAR.items():
            runs[name] = {str(budget): bench.measure(method, budget, seed) for budget in sorted(budgets)[:2]}
    if bench.pixel is not None:
        for name, method in (("pixel reward, best_of_n", BestOfN()), ("pixel reward, halving", Halving())):
            runs[name] = {str(budget): bench.measure(method, budget, seed, pixels=True) for budget in budgets}
    result["methods"] = runs
    write_result(output / generator / f"seed-{seed}", result)


def early(bench: Bench, seed: int) -> dict[str, float]:
    """Halving among eight, averaged over searches."""
    figures = [bench.measure(Halving(candidates=8), 8, fold_seed(seed, number)) for number in range(EARLY_SEARCHES)]
    return {name: fmean(figure[name] for figure in figures) for name in figures[0]}


def run_variants(generator: str, output: Path, *, prompts: int, budget: int = VARIANT_BUDGET) -> None:
    """Other settings at one budget; figures go to ``GENERATOR/variants``."""
    bench = Bench(generator, prompts)
    defaults = {name: METHODS[name] for name in ("halving", "fk", "stepwise", "zero_order", "guidance")}
    settings = {**defaults, **VARIANTS}
    result = {name: bench.measure(method, budget, VARIANT_SEED) for name, method in settings.items()}
    write_result(output / generator / "variants", {"budget": budget, "methods": result})


def run_alignment(output: Path, iterations: int) -> None:
    """Aligns the flow-matching generator with its reward; the LoRA goes to ``alignment``."""
    align(output / "alignment", iterations=iterations, evaluate_every=iterations, **WHOLE_GROUPS)
    write_result(output / "alignment", {"iterations": iterations})


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one job of the comparison of search methods.")
    parser.add_argument("job", choices=[*GENERATORS, "align"])
    parser.add_argument("--output", type=Path, default=Path("outputs/search"), help="directory of all jobs")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--variants", action="store_true", help="other settings instead, on a seed of their own")
    parser.add_argument("--prompts", type=int, default=12, help="different prompts, each searched twice")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="in whole samples per prompt")
    parser.add_argument("--pool", type=int, default=64, help="samples per prompt for the curve of best-of-N")
    parser.add_argument("--iterations", type=int, default=15, help="of the alignment")
    parser.add_argument("--pixel-reward", type=Path, help="directory of a trained pixel reward")
    arguments = parser.parse_args()
    if arguments.job == "align":
        run_alignment(arguments.output, arguments.iterations)
    elif arguments.variants:
        run_variants(arguments.job, arguments.output, prompts=arguments.prompts)
    else:
        run_job(
            arguments.job,
            arguments.seed,
            arguments.output,
            prompts=arguments.prompts,
            budgets=arguments.budgets,
            pool=arguments.pool,
            pixel_reward=arguments.pixel_reward,
        )


if __name__ == "__main__":
    main()
