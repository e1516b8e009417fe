"""Aligns a generator with a latent reward by Flow-GRPO; no pixel is decoded in training.

    python recipes/flow_grpo.py --config recipes/configs/flow_grpo_shapes.yaml
    accelerate launch recipes/flow_grpo.py --config recipes/configs/flow_grpo_sd35_medium.yaml --learning_rate 1e-4

Any field of `FlowGRPOArguments` and `DiffusionGRPOConfig` may stand in the YAML file or on the command line, which wins; an
unknown key is an error. The trained LoRA lands in `output_dir`, with its moving average in `output_dir/ema`.
A run that was killed continues with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import TrlParser

from dina_reward import LatentReward
from dina_reward.alignment import DiffusionGRPOConfig, DiffusionGRPOTrainer


SHAPES = "shapes"


@dataclass
class FlowGRPOArguments:
    """What to align with which reward on which prompts."""

    model_name_or_path: str = field(metadata={"help": "Diffusers pipeline (hub id or path), or 'shapes'."})
    reward_model_path: str = field(metadata={"help": "LatentReward checkpoint (hub id or path), or 'shapes'."})
    dataset_name: str = field(
        metadata={
            "help": "Prompts: a folder of SPLIT.txt files with one per line, a dataset with a prompt column, or 'shapes'."
        }
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default="test", metadata={"help": "Held-out split; null for none."})
    max_eval_prompts: int = field(default=128, metadata={"help": "Evaluate on the first so many held-out prompts."})
    torch_dtype: str = field(default="float32", metadata={"help": "Dtype of the frozen weights: float32, bfloat16."})
    share_backbone: bool = field(
        default=True, metadata={"help": "Let the reward run on the generator's own weights instead of a copy."}
    )


def load_models(arguments: FlowGRPOArguments, device: torch.device) -> tuple[Any, LatentReward]:
    """Generator and reward on one device."""
    dtype = getattr(torch, arguments.torch_dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"torch_dtype must name a torch dtype such as 'bfloat16', got {arguments.torch_dtype!r}")
    from dina_reward import shapes

    if arguments.model_name_or_path == SHAPES:
        pipeline: Any = shapes.load_pipeline(torch_dtype=dtype)
    else:
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(arguments.model_name_or_path, torch_dtype=dtype)
    pipeline.to(device)
    shipped = arguments.reward_model_path == SHAPES
    path = shapes.weights_dir("sd3-reward") if shipped else arguments.reward_model_path
    return pipeline, LatentReward.from_pretrained(path, pipeline=pipeline, share_backbone=arguments.share_backbone)


def load_prompts(arguments: FlowGRPOArguments, split: str, seed: int) -> Any:
    """Prompts of one split."""
    if arguments.dataset_name == SHAPES:
        from dina_reward.shapes.alignment import held_out_prompts, training_prompts

        return held_out_prompts() if split == "held_out" else training_prompts(seed)
    if Path(arguments.dataset_name).is_dir() and Path(arguments.dataset_name, f"{split}.txt").is_file():
        lines = Path(arguments.dataset_name, f"{split}.txt").read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip()]
    from datasets import load_dataset

    return load_dataset(arguments.dataset_name, split=split)


def evaluators(arguments: FlowGRPOArguments) -> list[Any]:
    """Judges of decoded held-out images that training never sees; add your own for real images."""
    if arguments.dataset_name != SHAPES:
        return []
    from dina_reward.shapes.alignment import oracle_scores

    return [oracle_scores]


def main(arguments: FlowGRPOArguments, config: DiffusionGRPOConfig) -> None:
    """Trains, and writes LoRA, evaluation history and pictures to the output directory."""
    pipeline, reward = load_models(arguments, config.device)
    held_out = None
    if arguments.dataset_test_split is not None:
        held_out = load_prompts(arguments, arguments.dataset_test_split, seed=0)
        count = min(arguments.max_eval_prompts, len(held_out))
        held_out = [held_out[index] for index in range(count)]
    trainer = DiffusionGRPOTrainer(
        pipeline,
        reward,
        config,
        train_dataset=load_prompts(arguments, arguments.dataset_train_split, seed=config.seed),
        eval_dataset=held_out,
        evaluators=evaluators(arguments),
    )
    resume = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    trainer.save_model()


if __name__ == "__main__":
    main(*TrlParser((FlowGRPOArguments, DiffusionGRPOConfig)).parse_args_and_config())
