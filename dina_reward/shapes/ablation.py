"""One run of the ablation: a reward that differs from the published recipe in one thing, trained, evaluated and used.

`recipes/ablate_reward.py` runs all of them and tabulates; one is ``python -m dina_reward.shapes.ablation frozen 0``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.evaluation import PairProtocol, fit_variance, measure_calibration, pairwise_accuracy, score_pairs
from dina_reward.likelihood import PreferenceModel, ThurstoneModel, ensemble_level
from dina_reward.reward import LatentReward
from dina_reward.shapes.alignment import align
from dina_reward.shapes.preferences import NEGLIGIBLE_GAP, SOURCES, PreferencePairs, build_pool, sample_pairs
from dina_reward.shapes.reward import train_reward
from dina_reward.shapes.shipped import load_pipeline


RESULT_NAME = "result.json"
STEPS, ITERATIONS = 850, 12
"""Optimizer steps of a reward; alignment iterations with it."""


@dataclass(frozen=True)
class Variant:
    """What differs from the published recipe.

    Args:
        title: name in the table.
        reward: fields of `LatentRewardConfig`.
        training: fields of `LatentRewardTrainingConfig`.
        use_level: noise level at which the reward is used in alignment, one that it was trained at.
    """

    title: str
    reward: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    use_level: float = 0.4


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
}
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ENSEMBLES = {1: (0.4,), 2: (0.3, 0.5), 3: (0.2, 0.4, 0.6), 5: (0.2, 0.3, 0.4, 0.5, 0.6)}
"""Number of levels: the levels, all around .4."""

BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 64, 1.5e-3, 0.985
TRAIN_POOL, TEST_POOL = 1024, 128
TRAIN_PAIRS, TEST_PAIRS = 80_000, 2_600
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
            made = informative(sample_pairs(build_pool(load_pipeline(), split, pool, seed), split, pairs, seed))
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


class SingleVotes(Sequence[Mapping[str, Any]]):
    """Training rows as most datasets have them: what one labeller said of each pair, with his errors.

    Args:
        pairs: the labelled pairs.
    """

    def __init__(self, pairs: PreferencePairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        return {**self.pairs[index], "p_chosen": 1.0}


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
    pipeline, started = load_pipeline(), time.perf_counter()
    reward = train_reward(
        pipeline,
        SingleVotes(PreferencePairs.load(output / "pairs" / "train.safetensors")),
        directory / "reward",
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        seed=seed,
        reward_settings=variant.reward,
        training_settings={"ema_decay": EMA_DECAY, **variant.training},
    )
    trained = time.perf_counter()
    held_out, fresh = (
        PreferencePairs.load(output / "pairs" / f"{split}.safetensors") for split in ("held_out", "fresh")
    )
    result: dict[str, Any] = evaluate_variant(reward, list(held_out), SingleVotes(fresh))
    evaluated = time.perf_counter()
    aligned = align(
        directory / "alignment",
        iterations=iterations,
        evaluate_every=iterations,
        seed=seed,
        reward_path=directory / "reward" / "averaged",
        reward_noise_level=[variant.use_level],
    )
    first, last = aligned.history[0].metrics, aligned.history[-1].metrics
    result["alignment"] = {
        metric: [first[metric], last[metric]] for metric in first if metric in last and metric != "step"
    }
    result["seconds"] = {
        "training": trained - started,
        "evaluation": evaluated - trained,
        "alignment": time.perf_counter() - evaluated,
    }
    with atomic_file(directory / RESULT_NAME) as staging:
        staging.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def evaluate_variant(reward: LatentReward, pairs: Sequence[Any], fresh: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy and calibration of one reward, at every level and of ensembles in both ways, for JSON.

    Args:
        reward: the reward.
        pairs: held-out pairs.
        fresh: pairs with single votes that a Thurstone variance is fitted to; calibration with it is reported, too.
    """
    single = score_pairs(reward, pairs, PairProtocol(LEVELS, None), batch_size=256, progress=False)
    labels, margins = single.p_chosen, dict(zip(LEVELS, single.margins.T, strict=True))
    model = reward.preference_model
    ensembles: dict[str, dict[str, Any]] = {"mean": {}, "tokens": {}}
    for count, levels in ENSEMBLES.items():
        # All levels of an ensemble see one noise tensor, so the average of single-level scores is the ensemble "mean".
        average = torch.stack([margins[level] for level in levels]).mean(dim=0)
        ensembles["mean"][str(count)] = _figures(model, average, labels, levels)
        if count == 1:
            ensembles["tokens"]["1"] = ensembles["mean"]["1"]
            continue
        scores = score_pairs(reward, pairs, PairProtocol((), levels, "tokens"), batch_size=256, progress=False)
        ensembles["tokens"][str(count)] = _figures(model, scores.margins[:, 0], labels, levels)
    fitted = None
    if isinstance(model, ThurstoneModel):
        votes = score_pairs(reward, fresh, PairProtocol(LEVELS, None), batch_size=256, progress=False)
        found = fit_variance(votes.margins, LEVELS, votes.p_chosen)
        errors = {f"{level:g}": _figures(found, margins[level], labels, (level,))["ece"] for level in LEVELS}
        fitted = {"variance_scale": found.variance_scale, "variance_offset": found.variance_offset, "ece": errors}
    return {
        "pairs": len(pairs),
        "fitted": fitted,
        "levels": {f"{level:g}": _figures(model, margins[level], labels, (level,)) for level in LEVELS},
        "score_std": {
            f"{level:g}": float(torch.cat([chosen, rejected]).std())
            for level, chosen, rejected in zip(LEVELS, single.chosen.T, single.rejected.T, strict=True)
        },
        "ensembles": ensembles,
    }


def _figures(model: PreferenceModel, margins: Tensor, labels: Tensor, levels: Sequence[float]) -> dict[str, float]:
    probability = model.probability(margins, torch.zeros_like(margins), ensemble_level(torch.tensor(levels)))
    calibration = measure_calibration(probability, labels)
    return {
        "accuracy": pairwise_accuracy(margins, labels).value,
        "ece": calibration.expected_calibration_error,
        "nll": calibration.nll,
        "brier": calibration.brier,
    }


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
