"""Aligning the embedded generators with the embedded rewards: what the demo, the benchmark and the example run.

The flow-matching generator is aligned by DiffusionNFT (arXiv 2509.16117) by default: it trains on samples themselves, not
on noisy steps, and so keeps them as clean as they are. The DDPM one is aligned by GRPO.

`python -m dina_reward.shapes.alignment --seeds 0 1 2` prints how the oracle's view of held-out prompts changes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from dina_reward.alignment import (
    AlignmentTrainer,
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionNFTConfig,
    DiffusionNFTTrainer,
)
from dina_reward.alignment.monitoring.evaluation import HISTORY_NAME, EvaluationRecord, read_history
from dina_reward.reward import LatentReward
from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.prompts import all_scenes, sample_prompts
from dina_reward.shapes.shipped import load_pipeline, load_reward
from dina_reward.shapes.text import MAX_PROMPT_TOKENS
from dina_reward.shapes.worlds import World, get_world


ITERATIONS = 70
EVALUATION_PROMPTS = 144
EVALUATION_IMAGES = 36
OPTIMIZER_STEPS_PER_ITERATION = 2
_EVALUATION_SEED = 1

NFT: Mapping[str, Any] = MappingProxyType(
    {
        "num_inference_steps": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "num_train_timesteps": 4,
        "num_generations": 8,
        "keep_per_group": 4,
        "nft_beta": 1.0,
        "beta_kl": 0.005,
        "scale_rewards": "batch",
        "old_policy_decay_rate": 0.0,
        "merge_for_rollout": True,
        "reward_noise_level": [0.1],
    }
)
"""Fields of `DiffusionNFTConfig` for the flow-matching generator."""

WHOLE_GROUPS: Mapping[str, Any] = MappingProxyType(
    {
        "num_generations": 12,
        "keep_per_group": None,
        "beta_kl": 0.0,
        "scale_rewards": "group",
        "old_policy_decay_rate": 0.001,
        "merge_for_rollout": False,
        "reward_noise_level": [0.4],
    }
)
"""What differs in runs that train on every sample: those of the ablation and of the comparison of search methods."""


@dataclass(frozen=True)
class AlignmentResult:
    """One alignment run.

    Args:
        history: held-out evaluations, the first before training and the last after it.
        seconds: duration of training with its evaluations.
        output_dir: checkpoints, history and pictures.
    """

    history: list[EvaluationRecord]
    seconds: float
    output_dir: Path

    def gain(self, metric: str) -> float:
        """Change of a held-out metric from the first evaluation to the last."""
        return self.history[-1].metrics[metric] - self.history[0].metrics[metric]


def oracle_scores(images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Held-out evaluator: the oracle's fit and cleanness of decoded images. Never a training reward."""
    scores = Oracle()(images.cpu(), list(prompts))
    return {"fit": scores.fit, "cleanness": scores.cleanness}


def held_out_prompts() -> list[str]:
    """Prompts of every evaluation, the same in each run; neither generator nor reward has trained on their scenes."""
    return sample_prompts(EVALUATION_PROMPTS, "held_out", seed=_EVALUATION_SEED)


def training_prompts(seed: int) -> list[str]:
    """Prompts of a run, in an order that depends on its seed: five for each training scene."""
    return sample_prompts(5 * len(all_scenes("train")), "train", seed=seed)


def alignment_settings(world: World) -> dict[str, Any]:
    """Fields of `DiffusionGRPOConfig` for two CPU cores: 192 samples per iteration, judged at level 0.4."""
    return {**_COMMON, **world.alignment}


def alignment_config(
    output_dir: str | Path,
    *,
    world: str = "flow",
    iterations: int = ITERATIONS,
    evaluate_every: int = 10,
    seed: int = 0,
    **overrides: Any,
) -> DiffusionGRPOConfig:
    """Settings of a run of Flow-GRPO, or of GRPO on the DDPM generator.

    Args:
        output_dir: where the run writes.
        world: "flow" or "ddpm".
        iterations: generations of samples.
        evaluate_every: iterations between held-out evaluations.
        seed: of every random draw.
        overrides: further fields of `DiffusionGRPOConfig`.
    """
    settings = {**alignment_settings(get_world(world)), **_run_settings(iterations, evaluate_every, seed), **overrides}
    return DiffusionGRPOConfig(output_dir=str(output_dir), **settings)


def nft_config(
    output_dir: str | Path,
    *,
    iterations: int = ITERATIONS,
    evaluate_every: int = 10,
    seed: int = 0,
    **overrides: Any,
) -> DiffusionNFTConfig:
    """Settings of a run of DiffusionNFT on the flow-matching generator; arguments as for `alignment_config`."""
    settings = {**_COMMON, **NFT, **_run_settings(iterations, evaluate_every, seed), **overrides}
    return DiffusionNFTConfig(output_dir=str(output_dir), **settings)


def _run_settings(iterations: int, evaluate_every: int, seed: int) -> dict[str, Any]:
    steps = OPTIMIZER_STEPS_PER_ITERATION
    return {"max_steps": iterations * steps, "eval_steps": evaluate_every * steps, "seed": seed}


_COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 96,
    "steps_per_generation": OPTIMIZER_STEPS_PER_ITERATION,
    "gradient_accumulation_steps": 1,
    "num_generations": 12,
    "height": 32,
    "width": 32,
    "max_sequence_length": MAX_PROMPT_TOKENS,
    "max_grad_norm": 1.0,
    "lora_rank": 32,
    "lora_alpha": 64,
    "ema_decay": None,
    "reward_noise_level": [0.4],
    "eval_strategy": "steps",
    "eval_on_start": True,
    "eval_num_inference_steps": 10,
    "eval_num_images": EVALUATION_IMAGES,
    "per_device_eval_batch_size": EVALUATION_PROMPTS,
    "logging_steps": OPTIMIZER_STEPS_PER_ITERATION,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


def align(
    output_dir: str | Path,
    *,
    world: str = "flow",
    iterations: int = ITERATIONS,
    seed: int = 0,
    reward_path: str | Path | None = None,
    algorithm: str | None = None,
    callbacks: Sequence[Any] = (),
    **overrides: Any,
) -> AlignmentResult:
    """Trains a LoRA of the shipped generator on a latent reward alone and watches it with the oracle.

    Args:
        algorithm: "nft" (flow matching alone) or "grpo"; by default that of the world.
        reward_path: checkpoint of a reward on this generator; the shipped one by default.
        callbacks: of the trainer.

    Other arguments as for `alignment_config`.
    """
    pipeline = load_pipeline(world)
    pipeline.set_progress_bar_config(disable=True)
    if reward_path is None:
        reward = load_reward(world, pipeline=pipeline, share_backbone=True)
    else:
        reward = LatentReward.from_pretrained(reward_path, pipeline=pipeline, share_backbone=True)
    data: dict[str, Any] = {
        "train_dataset": training_prompts(seed),
        "eval_dataset": held_out_prompts(),
        "eval_reward_funcs": oracle_scores,
        "callbacks": list(callbacks),
    }
    settings: dict[str, Any] = {"iterations": iterations, "seed": seed, **overrides}
    trainer: AlignmentTrainer
    if (algorithm or ("nft" if world == "flow" else "grpo")) == "nft":
        trainer = DiffusionNFTTrainer(pipeline, reward, nft_config(output_dir, **settings), **data)
    else:
        trainer = DiffusionGRPOTrainer(pipeline, reward, alignment_config(output_dir, world=world, **settings), **data)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(str(output_dir))
    return AlignmentResult(read_history(Path(output_dir, HISTORY_NAME)), seconds, Path(output_dir))


def _row(seed: int, result: AlignmentResult) -> Mapping[str, float]:
    first, last = result.history[0].metrics, result.history[-1].metrics
    return {
        "seed": seed,
        **{f"{name}_before": first[name] for name in ("reward", "fit", "cleanness")},
        **{f"{name}_after": last[name] for name in ("reward", "fit", "cleanness")},
        "seconds": result.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Align the embedded generator and let the oracle judge.")
    parser.add_argument("--output", type=Path, default=Path("outputs/alignment"), help="directory of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run per seed")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="generations of 192 samples per run")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        result = align(arguments.output / f"seed-{seed}", iterations=arguments.iterations, seed=seed)
        rows.append(_row(seed, result))
    print(json.dumps(rows, indent=2))
    for row in rows:
        gain = 100 * (row["fit_after"] - row["fit_before"])
        print(
            f"seed {row['seed']:.0f}: oracle fit {row['fit_before']:.3f} -> {row['fit_after']:.3f} ({gain:+.1f} points), "
            f"reward {row['reward_before']:.2f} -> {row['reward_after']:.2f}, {row['seconds']:.0f} s"
        )


if __name__ == "__main__":
    main()
