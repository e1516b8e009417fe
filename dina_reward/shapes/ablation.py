"""One run of the ablation: a reward that differs from the published recipe in one thing, trained, evaluated and used.

`recipes/ablate_reward.py` runs all of them and tabulates; one is ``python -m dina_reward.shapes.ablation frozen 0``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.evaluation import (
    DrawMargins,
    PairProtocol,
    fit_variance,
    margin_variances,
    measure_calibration,
    pairwise_accuracy,
    score_draws,
    score_pairs,
)
from dina_reward.likelihood import PreferenceModel, ThurstoneModel, ensemble_level
from dina_reward.reward import LatentReward
from dina_reward.shapes.alignment import WHOLE_GROUPS, align
from dina_reward.shapes.preferences import (
    LABEL_NOISE,
    NEGLIGIBLE_GAP,
    SOURCES,
    PreferencePairs,
    build_pool,
    sample_pairs,
)
from dina_reward.shapes.prompts import ATTRIBUTES
from dina_reward.shapes.reward import train_reward
from dina_reward.shapes.shipped import load_pipeline


RESULT_NAME = "result.json"
STEPS, ITERATIONS = 550, 8
"""Optimizer steps of a reward; alignment iterations with it."""


@dataclass(frozen=True)
class Variant:
    """What differs from the published recipe.

    Args:
        title: name in the table.
        reward: fields of `LatentRewardConfig`.
        training: fields of `LatentRewardTrainingConfig`.
        use_level: noise level at which the reward is used in alignment, one that it was trained at.
        labels: name of the labeller in `LABELLERS`.
        align: whether the generator is aligned with the reward.
    """

    title: str
    reward: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    use_level: float = 0.4
    labels: str = "even"
    align: bool = True


FIXED = {"variance_scale": 0.0, "variance_offset": 0.5}
VARIANTS = {
    "calibrated": Variant("noise-calibrated"),
    "calibrated_nll": Variant("noise-calibrated, NLL", training={"loss_type": "thurstone_nll"}),
    "fixed_variance": Variant("fixed variance", reward=FIXED),
    "bradley_terry": Variant(
        "Bradley-Terry", reward={"likelihood": "bradley_terry"}, training={"loss_type": "bradley_terry"}
    ),
    "clean_only": Variant(
        "clean only", reward=FIXED, training={"level_distribution": "constant", "level_value": 0.0}, use_level=0.0
    ),
    "frozen": Variant("frozen backbone", training={"freeze_backbone": True}),
    "uneven_calibrated": Variant("noise-calibrated, uneven labels", labels="uneven", align=False),
    "uneven_fixed": Variant("fixed variance, uneven labels", reward=FIXED, labels="uneven", align=False),
}
LEVELS, SINGLE = (0.0, 0.1, 0.2, 0.4, 0.6, 0.7, 0.8), 0.4
"""Levels that rewards are evaluated at; the single level that ensembles are compared with."""
ENSEMBLES, DRAWS = ((0.2, 0.4, 0.6), (0.1, 0.4, 0.7)), 3
"""Levels of the ensembles, all around `SINGLE`, the second ones further apart; noise draws of everything."""
TOKEN_ENSEMBLES = ENSEMBLES[1:]
"""Those that the head attends over, too: each takes as many passes as there are levels times draws, twice."""
FIT_LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8)
"""Levels that a Thurstone variance is fitted at."""

BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 32, 1.5e-3, 0.985
TRAIN_POOL, TEST_POOL = 1024, 128
TRAIN_PAIRS, TEST_PAIRS = 80_000, 1_200
PAIR_KINDS = {"any": 1.0}
"""Of two independent draws: in 300 steps of 64 pairs as the shipped reward has them, half of which differ in one attribute
alone, a reward came to 71 %, too little for differences to show."""
EVALUATION_SEED, FRESH_SEED = 1234, 777
KINDS = ("render", "ode", "sde")
"""Sources of the latents: renders and samples. Degraded ones, which are told apart without reading the prompt, are left out,
and so are pairs of negligible gap: a reward that trains this shortly would learn little else."""


def make_pairs(directory: Path) -> None:
    """Pairs to train on, held-out ones, and fresh ones of training captions for calibration; the same for every run."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "train": ("train", TRAIN_POOL, TRAIN_PAIRS, 0),
        "held_out": ("held_out", TEST_POOL, TEST_PAIRS, EVALUATION_SEED),
        "fresh": ("train", TEST_POOL, TEST_PAIRS, FRESH_SEED),
    }
    for name, (split, pool, pairs, seed) in settings.items():
        path = directory / f"{name}.safetensors"
        if not path.is_file():
            made = informative(
                sample_pairs(build_pool(load_pipeline(), split, pool, seed), split, pairs, seed, PAIR_KINDS)
            )
            with atomic_file(path) as staging:
                made.save(staging)


def informative(pairs: PreferencePairs) -> PreferencePairs:
    """Those of the pairs whose two latents are of `KINDS`, and whose qualities differ by more than a negligible gap.

    The gap is the oracle's; labels stay as noisy as they are.
    """
    kinds = torch.tensor([SOURCES.index(kind) for kind in KINDS])
    kept = torch.isin(pairs.source[pairs.chosen], kinds) & torch.isin(pairs.source[pairs.rejected], kinds)
    kept &= pairs.gap.abs() > NEGLIGIBLE_GAP
    columns = {name: getattr(pairs, name)[kept] for name in ("chosen", "rejected", "scenes", "gap")}
    return replace(pairs, **columns)


def even_deviation(pairs: PreferencePairs) -> Tensor:
    """Deviation of the labeller's error in quality, the same for every pair, shape ``(pairs,)``."""
    return torch.full((len(pairs),), LABEL_NOISE)


def uneven_deviation(pairs: PreferencePairs) -> Tensor:
    """Deviation of a labeller who errs more where there is less to see, shape ``(pairs,)``.

    ``LABEL_NOISE * (2 if the caption asks for a small shape else 1) * (1 + 2 (1 - c))``, where ``c`` is the cleanness of the
    less clean one of the two latents: three times the error where one is noise, six times where it is small, too.
    """
    size = list(ATTRIBUTES).index("size")
    small = pairs.scenes[:, size] == ATTRIBUTES["size"].index("small")
    cleanness = torch.minimum(pairs.cleanness[pairs.chosen], pairs.cleanness[pairs.rejected])
    return LABEL_NOISE * (1 + small.float()) * (1 + 2 * (1 - cleanness))


LABELLERS = {"even": even_deviation, "uneven": uneven_deviation}


def vote_again(pairs: PreferencePairs, deviation: Tensor, seed: int = 0) -> PreferencePairs:
    """The same pairs with new votes, right with probability ``Phi(|gap| / deviation)``.

    Args:
        pairs: whose qualities are known.
        deviation: of the labeller's error, shape ``(pairs,)``.
        seed: of the votes.
    """
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(len(pairs), generator=generator) < torch.special.ndtr(pairs.gap.abs() / deviation)
    kept = right == (pairs.gap >= 0)
    return replace(
        pairs,
        chosen=torch.where(kept, pairs.chosen, pairs.rejected),
        rejected=torch.where(kept, pairs.rejected, pairs.chosen),
        gap=torch.where(kept, pairs.gap, -pairs.gap),
    )


class LabelledRows(Sequence[Mapping[str, Any]]):
    """Rows of pairs with what a labeller says of each.

    Args:
        pairs: the pairs, the preferred latent first.
        deviation: of the labeller's error, shape ``(pairs,)``, for the probability of his vote; ``None``: the vote itself,
            with its errors, as most datasets have it.
    """

    def __init__(self, pairs: PreferencePairs, deviation: Tensor | None = None) -> None:
        self.pairs = pairs
        self._p_chosen = (
            torch.ones(len(pairs)) if deviation is None else torch.special.ndtr(pairs.gap / deviation)
        ).tolist()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        return {**self.pairs[index], "p_chosen": self._p_chosen[index]}

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[index] for index in range(len(self)))


def run_variant(name: str, seed: int, output: Path, *, steps: int = STEPS, iterations: int = ITERATIONS) -> None:
    """Trains, evaluates and uses one reward; its figures appear in ``output/name/seed-N/result.json`` when all is done.

    Args:
        name: one of `VARIANTS`.
        seed: of initial weights, noise, order and alignment.
        output: where `make_pairs` has put the pairs.
        steps: optimizer steps of the reward.
        iterations: alignment iterations with it.
    """
    variant, directory = VARIANTS[name], output / name / f"seed-{seed}"
    labeller = LABELLERS[variant.labels]
    train, held_out, fresh = (
        PreferencePairs.load(output / "pairs" / f"{part}.safetensors") for part in ("train", "held_out", "fresh")
    )
    if variant.labels != "even":
        train, fresh = (vote_again(pairs, labeller(pairs)) for pairs in (train, fresh))
    pipeline, started = load_pipeline(), time.perf_counter()
    reward = train_reward(
        pipeline,
        LabelledRows(train),
        directory / "reward",
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        seed=seed,
        reward_settings=variant.reward,
        training_settings={"ema_decay": EMA_DECAY, **variant.training},
    )
    trained = time.perf_counter()
    result: dict[str, Any] = evaluate_variant(
        reward, LabelledRows(held_out, labeller(held_out)), LabelledRows(fresh), variant.use_level
    )
    evaluated = time.perf_counter()
    result["alignment"] = _align(variant, directory, seed, iterations) if variant.align else None
    result["seconds"] = {
        "training": trained - started,
        "evaluation": evaluated - trained,
        "alignment": time.perf_counter() - evaluated,
    }
    with atomic_file(directory / RESULT_NAME) as staging:
        staging.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _align(variant: Variant, directory: Path, seed: int, iterations: int) -> dict[str, list[float]]:
    """What the held-out evaluations before and after alignment say, by metric."""
    aligned = align(
        directory / "alignment",
        iterations=iterations,
        evaluate_every=iterations,
        seed=seed,
        reward_path=directory / "reward" / "averaged",
        **{**WHOLE_GROUPS, "reward_noise_level": [variant.use_level]},
    )
    first, last = aligned.history[0].metrics, aligned.history[-1].metrics
    return {metric: [first[metric], last[metric]] for metric in first if metric in last and metric != "step"}


def evaluate_variant(
    reward: LatentReward, pairs: LabelledRows, fresh: LabelledRows, use_level: float
) -> dict[str, Any]:
    """Accuracy and calibration of one reward, at every level and of ensembles of every kind, for JSON.

    Args:
        reward: the reward.
        pairs: held-out pairs with the labeller's probabilities.
        fresh: pairs with single votes that a Thurstone variance is fitted to; calibration with it is reported, too.
        use_level: whose scores' deviation is the unit of the reward's gain in alignment.
    """
    options: dict[str, Any] = {"batch_size": 256, "progress": False}
    margins = score_draws(reward, pairs, LEVELS, ensembles=TOKEN_ENSEMBLES, draws=DRAWS, **options)
    used = score_pairs(reward, pairs, PairProtocol((use_level,), None), **options)
    model, labels = reward.preference_model, margins.labels
    variances = margin_variances(margins.margins, LEVELS)
    return {
        "pairs": len(pairs),
        "levels": {f"{level:g}": _figures(model, margins.at(level), labels, (level,)) for level in LEVELS},
        "noise_share": {f"{part.noise_level:g}": part.noise_share for part in variances},
        "ensembles": {
            name: _figures(model, values, labels, levels) for name, (levels, values) in _ensembles(margins).items()
        },
        "fitted": _fitted(reward, margins, fresh, options) if isinstance(model, ThurstoneModel) else None,
        "score_std": float(torch.cat([used.chosen, used.rejected]).std()),
    }


def _ensembles(margins: DrawMargins) -> dict[str, tuple[tuple[float, ...], Tensor]]:
    """Levels and margins ``(pairs, repetitions)`` by name: draws at one level; levels that share their noise or do not."""
    found: dict[str, tuple[tuple[float, ...], Tensor]] = {
        f"{count} draws": ((SINGLE,), margins.of_draws(SINGLE, count)) for count in range(2, DRAWS + 1)
    }
    for levels in ENSEMBLES:
        shown = ", ".join(f"{level:g}" for level in levels)
        for shared, noise in ((True, "shared noise"), (False, "own noise")):
            found[f"({shown}), {noise}, mean"] = levels, margins.of_levels(levels, shared=shared)
            if levels in TOKEN_ENSEMBLES:
                found[f"({shown}), {noise}, tokens"] = levels, margins.tokens[levels, shared]
    return found


def _fitted(
    reward: LatentReward, margins: DrawMargins, fresh: LabelledRows, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The variance that fits single votes best, and the calibration errors with it; none where no variance fits."""
    votes = score_pairs(reward, fresh, PairProtocol(FIT_LEVELS, None), **options)
    try:
        found = fit_variance(votes.margins, FIT_LEVELS, votes.p_chosen)
    except ValueError:  # no variance fits scores that say nothing about the votes
        return None
    errors = {f"{level:g}": _figures(found, margins.at(level), margins.labels, (level,))["ece"] for level in LEVELS}
    return {"variance_scale": found.variance_scale, "variance_offset": found.variance_offset, "ece": errors}


def _figures(model: PreferenceModel, margins: Tensor, labels: Tensor, levels: Sequence[float]) -> dict[str, float]:
    """Figures of margins ``(pairs, repetitions)``, means over repetitions."""
    level, rows = ensemble_level(torch.tensor(levels)), []
    for column in margins.T:
        calibration = measure_calibration(model.probability(column, torch.zeros_like(column), level), labels)
        rows.append(
            {
                "accuracy": pairwise_accuracy(column, labels).value,
                "ece": calibration.expected_calibration_error,
                "nll": calibration.nll,
                "brier": calibration.brier,
            }
        )
    return {name: mean(row[name] for row in rows) for name in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, evaluate and use one reward of the ablation.")
    parser.add_argument("variant", choices=list(VARIANTS))
    parser.add_argument("seed", type=int)
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"), help="directory of pairs and runs")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps, {BATCH_SIZE} pairs each")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="alignment iterations")
    arguments = parser.parse_args()
    make_pairs(arguments.output / "pairs")
    run_variant(
        arguments.variant, arguments.seed, arguments.output, steps=arguments.steps, iterations=arguments.iterations
    )


if __name__ == "__main__":
    main()
