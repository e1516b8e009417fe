"""One job of the comparison of the latent with a pixel reward: training, evaluation, or an alignment run.

`recipes/compare_pixel_reward.py` runs all of them and tabulates; one is
``python -m dina_reward.shapes.pixel_comparison align pixel --seed 0 --output outputs/pixel``.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dina_reward.alignment import DiffusionGRPOTrainer
from dina_reward.alignment.monitoring.evaluation import HISTORY_NAME, read_history
from dina_reward.checkpoints.atomic import atomic_directory
from dina_reward.evaluation import Accuracy, PairProtocol, measure_calibration, pairwise_accuracy
from dina_reward.evaluation import score_pairs as score_latent_pairs
from dina_reward.evaluation.cost import peak_memory, reset_peak_memory
from dina_reward.likelihood import ensemble_level
from dina_reward.reward import LatentReward
from dina_reward.shapes.alignment import (
    ITERATIONS,
    alignment_config,
    held_out_prompts,
    oracle_scores,
    training_prompts,
)
from dina_reward.shapes.autoencoder import decode_latents
from dina_reward.shapes.build import CALIBRATION_PAIRS, CALIBRATION_POOL, CALIBRATION_SEED, build
from dina_reward.shapes.jobs import write_result
from dina_reward.shapes.pixel_reward import STEPS, PixelReward, calibrate_pixel_reward, score_pairs, train_pixel_reward
from dina_reward.shapes.preferences import NEGLIGIBLE_GAP, PreferencePairs, build_pool, sample_pairs
from dina_reward.shapes.prompts import ATTRIBUTES
from dina_reward.shapes.reward import CLEAR_DIFFERENCE
from dina_reward.shapes.shipped import load_pipeline, load_reward, weights_dir


KINDS = ("latent", "pixel")
REWARD_NAME, FRESH_NAME = "pixel-reward", "fresh.safetensors"

OVERALL = "overall"
CELLS = (*ATTRIBUTES, "cleanness")
"""What the two sides of a pair differ in, where it is one thing alone; see `PreferencePairs.differs`."""

EVALUATIONS = 10
"""The most held-out evaluations of an alignment run, besides the one before it."""

COST_BATCH, COST_REPEATS = 96, 20
"""Samples per call whose cost is measured, as many as a micro-batch of the alignment has; calls, the fastest counts."""


def pairs_job(output: Path, world: Path, seed: int = 0) -> None:
    """Makes again the preferences that the shipped reward was trained and judged on, and those it was calibrated on.

    Args:
        output: gets ``pairs/fresh.safetensors``.
        world: gets what `dina_reward.shapes.build` writes from the shipped generator, unless it is there.
        seed: that of the build.
    """
    if not (world / "flow").is_dir():
        with atomic_directory(world / "flow") as staging:
            shutil.copytree(weights_dir("flow"), staging, dirs_exist_ok=True)
    build(world, ["aligned", "preferences"], seed=seed)
    aligned = load_file(world / "flow-aligned" / "train.safetensors")["latents"]
    pool = build_pool(load_pipeline(), "train", CALIBRATION_POOL, seed + CALIBRATION_SEED, aligned)
    path = output / "pairs" / FRESH_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_pairs(pool, "train", CALIBRATION_PAIRS, seed + CALIBRATION_SEED).save(path)
    write_result(path.parent, {})


def train_job(output: Path, world: Path, *, steps: int, seed: int = 0) -> None:
    """Trains the pixel reward on the pairs that the shipped reward was trained on, and fits its variance to fresh ones.

    Args:
        output: where `pairs_job` has put the fresh pairs; gets ``pixel-reward`` and ``pixel-reward-training``.
        world: where the training preferences are.
        steps: optimizer steps.
        seed: of initial weights and order.
    """
    pipeline, started = load_pipeline(), time.perf_counter()
    pairs = PreferencePairs.load(world / "flow-preferences" / "train.safetensors")
    reward = train_pixel_reward(pipeline, pairs, output / f"{REWARD_NAME}-training", steps=steps, seed=seed)
    seconds = time.perf_counter() - started
    calibrate_pixel_reward(reward, PreferencePairs.load(output / "pairs" / FRESH_NAME), pipeline)
    reward.save_pretrained(output / REWARD_NAME)
    figures = {"pairs": len(pairs), "steps": steps, "parameters": reward.num_parameters, "seconds": seconds}
    write_result(output / "train", {**figures, "variance": reward.config.variance_offset})


def load_kind(kind: str, output: Path, pipeline: Any) -> Any:
    """The shipped latent reward, or the pixel reward that `train_job` has left.

    Raises:
        ValueError: ``kind`` is none of `KINDS`.
    """
    if kind == "latent":
        return load_reward(pipeline=pipeline, share_backbone=True)
    if kind == "pixel":
        return PixelReward.from_pretrained(output / REWARD_NAME, pipeline)
    raise ValueError(f"no reward called {kind!r}; there are: {', '.join(KINDS)}")


def evaluate_job(kind: str, output: Path, world: Path) -> None:
    """Accuracy by what differs and overall, calibration, cost and size of one reward, on pairs that are the same for both.

    Accuracy is of the clear pairs, calibration of all.

    Args:
        kind: one of `KINDS`.
        output: where the pixel reward is; the figures go to ``evaluate-KIND``.
        world: where the held-out preferences are.
    """
    pipeline = load_pipeline()
    pairs = PreferencePairs.load(world / "flow-preferences" / "held_out.safetensors")
    reward = load_kind(kind, output, pipeline)
    levels = tuple(alignment_config(output).reward_noise_level)
    margins = _margins(reward, pairs, pipeline, levels)
    labels = torch.tensor([record["p_chosen"] for record in pairs])
    level = torch.tensor(0.0) if kind == "pixel" else ensemble_level(torch.tensor(levels))
    probability = reward.preference_model.probability(margins, torch.zeros_like(margins), level)
    calibration = measure_calibration(probability, labels)
    accuracies = accuracy_by_cell(margins, labels, pairs)
    result = {
        **parameters_of(reward),
        "noise_levels": list(levels) if kind == "latent" else None,
        "accuracy": {name: each.value for name, each in accuracies.items()},
        "standard_error": {name: each.standard_error for name, each in accuracies.items()},
        "pairs": {name: each.counted for name, each in accuracies.items()},
        "ece": calibration.expected_calibration_error,
        "nll": calibration.nll,
        "brier": calibration.brier,
        "cost": measure_cost(reward, pipeline, pairs.latents[:COST_BATCH], levels),
    }
    write_result(output / f"evaluate-{kind}", result)


def accuracy_by_cell(margins: Tensor, labels: Tensor, pairs: PreferencePairs) -> dict[str, Accuracy]:
    """Accuracy overall and in each of `CELLS`, of the pairs that `evaluate_reward` calls clear.

    Args:
        margins (`Tensor`): chosen minus rejected score, shape ``(len(pairs),)``.
        labels (`Tensor`): the labeller's probabilities, shape ``(len(pairs),)``.
        pairs: the pairs.
    """
    differs = [pairs.differs(row) for row in range(len(pairs))]
    inside = {cell: torch.tensor([name == cell for name in differs]) for cell in CELLS}
    difference = (pairs.cleanness[pairs.chosen] - pairs.cleanness[pairs.rejected]).abs()
    clear = (pairs.gap.abs() > NEGLIGIBLE_GAP) | (inside["cleanness"] & (difference > CLEAR_DIFFERENCE))
    rows = {OVERALL: clear, **{cell: clear & members for cell, members in inside.items()}}
    return {name: pairwise_accuracy(margins[kept], labels[kept]) for name, kept in rows.items()}


def parameters_of(reward: Any) -> dict[str, int]:
    """Parameters that a reward reads with, and those of them that were trained on preferences."""
    if isinstance(reward, LatentReward):
        trained = sum(tensor.numel() for tensor in reward.model.trainable_state().values())
        return {
            "parameters": sum(parameter.numel() for parameter in reward.model.parameters()),
            "trained_parameters": trained,
        }
    return {"parameters": reward.num_parameters, "trained_parameters": reward.num_parameters}


def measure_cost(
    reward: Any, pipeline: Any, latents: Tensor, levels: Sequence[float], repeats: int = COST_REPEATS
) -> dict[str, float]:
    """CPU milliseconds per sample of scoring latents, decoding included, and of decoding alone; and memory.

    Args:
        reward: of latents or of images.
        pipeline: decodes.
        latents (`Tensor`): one batch.
        levels: noise levels of a latent reward.
        repeats: calls; the fastest counts.

    Returns:
        ``score_ms`` (all of it), ``decode_ms`` (the part that decodes, 0 for a reward of latents), and ``peak_memory_mb``
        (what the resident set of the process grows by while scoring).
    """
    prompts = held_out_prompts()
    prompts = [prompts[row % len(prompts)] for row in range(len(latents))]
    decode = partial(decode_latents, pipeline.vae, latents)
    if isinstance(reward, LatentReward):
        score: Callable[[], Any] = partial(reward, latents, prompts, noise_level=list(levels), seed=0)
        decode_ms = 0.0
    else:
        score = lambda: reward(decode(), prompts)  # noqa: E731
        decode_ms = _milliseconds(decode, repeats) / len(latents)
    with torch.no_grad():
        reset_peak_memory()
        before, _ = peak_memory()
        score_ms = _milliseconds(score, repeats) / len(latents)
    after, _ = peak_memory()
    return {"score_ms": score_ms, "decode_ms": decode_ms, "peak_memory_mb": max(0, after - before) / 2**20}


def align_job(kind: str, seed: int, output: Path, *, iterations: int) -> None:
    """Flow-GRPO with one reward, the oracle as held-out judge; everything else is `alignment_config`.

    Args:
        kind: one of `KINDS`.
        seed: of every draw.
        output: where the pixel reward is; the run goes to ``align-KIND/seed-N``.
        iterations: generations of samples.
    """
    directory = output / f"align-{kind}" / f"seed-{seed}"
    pipeline, clock = load_pipeline(), _Clock()
    pipeline.set_progress_bar_config(disable=True)
    # So many evaluations that one falls on the end.
    count = next(count for count in range(EVALUATIONS, 0, -1) if iterations % count == 0)
    config = alignment_config(directory, iterations=iterations, evaluate_every=iterations // count, seed=seed)
    trainer = DiffusionGRPOTrainer(
        pipeline,
        load_kind(kind, output, pipeline),
        config,
        train_dataset=training_prompts(seed),
        eval_dataset=held_out_prompts(),
        eval_reward_funcs=oracle_scores,
        callbacks=[clock],
    )
    trainer.train()
    records = read_history(directory / HISTORY_NAME)
    history = [
        {"step": record.step, **record.metrics, **record.costs, "train_cpu_seconds": clock.seconds[record.step]}
        for record in records
    ]
    lines = [line for line in trainer.state.log_history if "time/reward" in line]
    parts = {name: sum(line[f"time/{name}"] for line in lines) for name in ("rollout", "reward", "train")}
    parts["train"] *= config.micro_steps_per_generation  # logged per micro-step
    result = {
        "seed": seed,
        "history": history,
        "reward_share": parts["reward"] / sum(parts.values()),
        "hacking_alarms": sum(len(record.hacking) for record in records),
        "peak_memory_mb": peak_memory()[0] / 2**20,
        "cpu_seconds": time.process_time(),
    }
    write_result(directory, result)


class _Clock(TrainerCallback):
    """CPU seconds of training at every evaluation, without those that evaluations took."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._begin = self._before = self._evaluating = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin = self._before = time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = time.process_time()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seconds[state.global_step] = self._before - self._begin - self._evaluating
        self._evaluating += time.process_time() - self._before


def _margins(reward: Any, pairs: PreferencePairs, pipeline: Any, levels: Sequence[float]) -> Tensor:
    if isinstance(reward, PixelReward):
        return score_pairs(reward, pairs, pipeline)
    protocol = PairProtocol((), tuple(levels)) if len(levels) > 1 else PairProtocol(tuple(levels), None)
    return score_latent_pairs(reward, pairs, protocol, batch_size=128, progress=False).margins[:, 0]


def _milliseconds(function: Callable[[], Any], repeats: int) -> float:
    """CPU time of the fastest call; on a busy machine the wall clock would measure the other jobs."""
    function()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return 1000 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one job of the comparison of a latent with a pixel reward.")
    parser.add_argument("job", choices=["pairs", "train", "evaluate", "align"])
    parser.add_argument("kind", choices=KINDS, nargs="?", default="pixel")
    parser.add_argument("--output", type=Path, default=Path("outputs/pixel"), help="directory of all jobs")
    parser.add_argument("--world", type=Path, help="output of the build, default: 'world' in the output directory")
    parser.add_argument("--seed", type=int, default=0, help="of an alignment run")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of an alignment run")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of the pixel reward")
    arguments = parser.parse_args()
    output, world = arguments.output, arguments.world or arguments.output / "world"
    if arguments.job == "pairs":
        pairs_job(output, world)
    elif arguments.job == "train":
        train_job(output, world, steps=arguments.steps)
    elif arguments.job == "evaluate":
        evaluate_job(arguments.kind, output, world)
    else:
        align_job(arguments.kind, arguments.seed, output, iterations=arguments.iterations)


if __name__ == "__main__":
    main()
