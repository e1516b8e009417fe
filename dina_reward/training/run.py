"""Reward training from a configuration: what `recipes/train_reward.py` and ``dina-reward train`` run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dina_reward import LatentReward, LatentRewardConfig
from dina_reward.arguments import ConfigParser
from dina_reward.data import load_preferences
from dina_reward.evaluation import evaluate_preferences, plot_evaluation
from dina_reward.families import family_of
from dina_reward.head import RewardHeadConfig
from dina_reward.modeling import default_lora_config
from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig


SHAPES = "shapes"
_PAIRS_PER_POOLED_LATENT = 15


@dataclass
class TrainRewardArguments:
    """What to train on what."""

    model_name_or_path: str = field(
        metadata={"help": "Diffusers pipeline (hub id or path) whose denoiser becomes the backbone, or 'shapes'."}
    )
    dataset_name: str = field(
        metadata={"help": "Preferences: see dina_reward.data.load_preferences; 'shapes' makes them on the spot."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default="test", metadata={"help": "Split to evaluate on; null for none."})
    max_train_pairs: int | None = field(default=None, metadata={"help": "Train on the first so many pairs."})
    max_eval_pairs: int | None = field(default=None, metadata={"help": "Evaluate on the first so many pairs."})
    torch_dtype: str = field(default="float32", metadata={"help": "Dtype of the frozen backbone: float32, bfloat16."})
    num_layers: int = field(default=12, metadata={"help": "Blocks of the backbone that run."})
    visual_taps: list[int] = field(
        default_factory=lambda: [4, 8, 12], metadata={"help": "Blocks (from 1) after which image tokens are read."}
    )
    text_taps: list[int] | None = field(default=None, metadata={"help": "The same for text; null: visual_taps."})
    head_width: int | None = field(default=None, metadata={"help": "Width of the head; null: the backbone's."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=128, metadata={"help": "Alpha of the LoRA, usually 2 * rank."})
    max_sequence_length: int | None = field(default=None, metadata={"help": "Token limit of prompts; null: default."})
    variance_scale: float = field(default=2.0, metadata={"help": "k of the Thurstone variance k sigma^2 + c."})
    variance_offset: float = field(default=0.05, metadata={"help": "c of the Thurstone variance."})


def load_pipeline(arguments: TrainRewardArguments) -> Any:
    """The pipeline that gives backbone, scheduler and text encoders; no autoencoder, since nothing is decoded."""
    dtype = getattr(torch, arguments.torch_dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch_dtype must name a torch dtype such as 'bfloat16', got {arguments.torch_dtype!r}")
    if arguments.model_name_or_path == SHAPES:
        from dina_reward.shapes import load_pipeline as load_shapes

        return load_shapes(torch_dtype=dtype)
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(arguments.model_name_or_path, torch_dtype=dtype, vae=None)


def load_pairs(arguments: TrainRewardArguments, pipeline: Any, split: str, limit: int | None, seed: int) -> Any:
    """Preference records of one split, at most `limit`."""
    if arguments.dataset_name == SHAPES:
        from dina_reward.shapes import build_pool, sample_pairs

        count = limit or 20_000
        split = "held_out" if split == "test" else split
        pool = build_pool(pipeline, split, max(count // _PAIRS_PER_POOLED_LATENT, 64), seed)
        return sample_pairs(pool, split, count, seed)
    pairs = load_preferences(arguments.dataset_name, split)
    return pairs if limit is None else [pairs[index] for index in range(min(limit, len(pairs)))]


def new_reward(arguments: TrainRewardArguments, pipeline: Any, seed: int) -> LatentReward:
    """An untrained reward on the first blocks of the pipeline's denoiser."""
    family = family_of(pipeline).name
    config = LatentRewardConfig(
        family=family,
        num_layers=arguments.num_layers,
        visual_taps=tuple(arguments.visual_taps),
        text_taps=None if arguments.text_taps is None else tuple(arguments.text_taps),
        backbone_model_id=arguments.model_name_or_path,
        head=RewardHeadConfig(width=arguments.head_width),
        variance_scale=arguments.variance_scale,
        variance_offset=arguments.variance_offset,
        max_sequence_length=arguments.max_sequence_length,
    )
    lora = default_lora_config(config, rank=arguments.lora_r, alpha=arguments.lora_alpha)
    return LatentReward.from_config(config, pipeline=pipeline, lora_config=lora, seed=seed)


def train_reward(arguments: TrainRewardArguments, training_args: LatentRewardTrainingConfig) -> None:
    """Trains, saves to ``output_dir`` and, with a test split, prints and draws the evaluation."""
    output_dir = training_args.output_dir
    assert output_dir is not None
    pipeline = load_pipeline(arguments)
    train_pairs = load_pairs(
        arguments, pipeline, arguments.dataset_train_split, arguments.max_train_pairs, training_args.seed
    )
    test_pairs = None
    if arguments.dataset_test_split is not None:
        test_pairs = load_pairs(
            arguments, pipeline, arguments.dataset_test_split, arguments.max_eval_pairs, training_args.seed + 1
        )
    pipeline.to(training_args.device)
    reward = new_reward(arguments, pipeline, training_args.seed)

    trainer = LatentRewardTrainer(reward, training_args, train_dataset=train_pairs, eval_dataset=test_pairs)
    resume = training_args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("true", "True") else resume)
    trainer.save_model(output_dir)

    if test_pairs is not None and trainer.is_world_process_zero():
        reward.load_weights(output_dir)
        report = evaluate_preferences(reward.eval(), test_pairs, batch_size=training_args.eval_batch_size)
        plot_evaluation(report, Path(output_dir, "evaluation.png"))
        print(report.table(), report.calibration_table("ensemble"), sep="\n\n")


def main(args: Sequence[str] | None = None) -> None:
    """Parses a command line with `ConfigParser` (``--config file.yaml`` and any field), and trains."""
    parser = ConfigParser((TrainRewardArguments, LatentRewardTrainingConfig))
    train_reward(*parser.parse_args_and_config(None if args is None else list(args)))
