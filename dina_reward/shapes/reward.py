"""The latent reward of the shapes world: trained on the noisy labeller's preferences, never on the oracle itself.

`python -m dina_reward.shapes.reward` prints the shipped reward's accuracy and calibration on fresh held-out pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from dina_reward.evaluation import (
    EvaluationReport,
    PairProtocol,
    plot_evaluation,
    report_from_scores,
    score_pairs,
)
from dina_reward.modeling import default_lora_config
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.reward import LatentReward
from dina_reward.shapes.preferences import NEGLIGIBLE_GAP, PreferencePairs, build_pool, sample_pairs
from dina_reward.shapes.shipped import load_aligned, load_reward, quiet_pipeline, weights_dir
from dina_reward.shapes.text import MAX_PROMPT_TOKENS
from dina_reward.shapes.worlds import WORLDS, world_of
from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig


LORA_RANK = 32

FEED_FORWARD = ("net.0.proj", "net.2")
"""Layers that get a LoRA beside the attention projections: to tell outlines apart, blocks this narrow need all they have."""

CLEAR_DIFFERENCE = 0.1
"""Pairs of equal fit count in accuracies from this difference in cleanness on."""

COLUMNS = ("differs", "outlines")
"""What accuracy is broken down by: an average over outlines can still hide a coin flip, as between circles and squares."""

PROTOCOL = PairProtocol(
    noise_levels=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), ensemble_levels=(0.2, 0.4, 0.6)
)


def new_reward(pipeline: Any, seed: int = 0, **settings: Any) -> LatentReward:
    """An untrained reward: on the first four of the flow generator's five blocks, on the UNet's down and mid blocks.

    Args:
        pipeline: the generator that gives backbone and text encoders.
        seed: of the initial weights.
        settings: further fields of `LatentRewardConfig`.
    """
    defaults = {"head": RewardHeadConfig(num_attention_heads=4), "max_sequence_length": MAX_PROMPT_TOKENS}
    config = world_of(pipeline).reward_config(**{**defaults, **settings})
    lora = default_lora_config(config, rank=LORA_RANK)
    lora.target_modules = {*cast(set[str], lora.target_modules), *FEED_FORWARD}  # type: ignore[assignment]
    return LatentReward.from_config(config, pipeline=pipeline, lora_config=lora, seed=seed)


def train_reward(
    pipeline: Any,
    pairs: PreferencePairs | Sequence[Mapping[str, Any]],
    output: str | Path,
    *,
    steps: int = 3000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    start: str | Path | None = None,
    reward_settings: Mapping[str, Any] | None = None,
    training_settings: Mapping[str, Any] | None = None,
) -> LatentReward:
    """Trains a reward as `LatentRewardTrainer` does for any model; checkpoints go to ``output``; a killed run
    resumes, a finished one is loaded.

    Args:
        pipeline: the generator that gives backbone and text encoders.
        pairs: training preferences.
        output: directory of checkpoints.
        steps, batch_size, learning_rate, seed: of the optimizer.
        start: a reward to go on from; a new one by default.
        reward_settings, training_settings: further fields of `LatentRewardConfig` and `LatentRewardTrainingConfig`.

    Returns:
        `LatentReward`: with the averaged weights, ready to score.
    """
    output, averaged = Path(output), Path(output, "averaged")
    if averaged.is_dir():
        return LatentReward.from_pretrained(averaged, pipeline=pipeline)
    if start is None:
        reward = new_reward(pipeline, seed, **(reward_settings or {}))
    else:
        reward = LatentReward.from_pretrained(start, pipeline=pipeline)
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": steps // 20,
        "ema_decay": 0.995,
        "level_distribution": "power",
        "level_exponent": 1.5,
        "logging_steps": 50,
        "save_steps": max(steps // 4, 1),
        "save_total_limit": 1,
        "report_to": "none",
        "use_cpu": True,
        "seed": seed,
    }
    arguments = LatentRewardTrainingConfig(output_dir=str(output), **{**settings, **(training_settings or {})})
    trainer = LatentRewardTrainer(reward, arguments, train_dataset=pairs)
    trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
    trainer.save_model(str(averaged))
    return LatentReward.from_pretrained(averaged, pipeline=pipeline)


def evaluate_reward(reward: LatentReward, pairs: PreferencePairs) -> EvaluationReport:
    """Accuracy by noise level, in all, by what differs and by the two outlines, on clear pairs; calibration on all of them.

    A pair is clear if its qualities differ by more than `NEGLIGIBLE_GAP`, or if it differs in cleanness alone, by more
    than `CLEAR_DIFFERENCE`.
    """
    scores = score_pairs(reward, pairs, PROTOCOL, columns=COLUMNS, batch_size=256)
    clear = pairs.gap.abs() > NEGLIGIBLE_GAP
    alike = torch.tensor([what == "cleanness" for what in scores.columns["differs"]])
    difference = (pairs.cleanness[pairs.chosen] - pairs.cleanness[pairs.rejected]).abs()
    clear |= alike & (difference > CLEAR_DIFFERENCE)
    report = report_from_scores(scores.select(clear), by=COLUMNS)
    return replace(report, calibration=report_from_scores(scores).calibration)


def fresh_pairs(pipeline: Any, world: str, pool: int, count: int, seed: int) -> PreferencePairs:
    """Held-out pairs of all kinds that no training has seen, samples of aligned generators among them."""
    latents = build_pool(pipeline, "held_out", pool, seed, aligned=load_aligned(world))
    return sample_pairs(latents, "held_out", count, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate the shipped reward on fresh pairs of held-out prompts.")
    parser.add_argument("--world", choices=[world.name for world in WORLDS], default="flow", help="which generator")
    parser.add_argument("--pool", type=int, default=256, help="latents of each source")
    parser.add_argument(
        "--pairs", type=int, default=4000, help="pairs to draw; accuracy leaves those of negligible gap out"
    )
    parser.add_argument("--seed", type=int, default=1234, help="seeds latents and pairs")
    parser.add_argument("--picture", type=Path, help="where to draw accuracy by noise level and calibration")
    arguments = parser.parse_args()
    pipeline = quiet_pipeline(weights_dir(arguments.world))
    pairs = fresh_pairs(pipeline, arguments.world, arguments.pool, arguments.pairs, arguments.seed)
    report = evaluate_reward(load_reward(arguments.world, pipeline=pipeline), pairs)
    print(
        report.table(),
        f"NLL, Brier score and calibration error are of all {len(pairs)} pairs; at level 0.4:",
        report.calibration_table("0.4"),
        sep="\n\n",
    )
    if arguments.picture is not None:
        plot_evaluation(report, arguments.picture)
        print(f"picture: {arguments.picture}")


if __name__ == "__main__":
    main()
