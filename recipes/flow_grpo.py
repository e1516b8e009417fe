"""Aligns a flow-matching generator with a latent reward by Flow-GRPO; no pixel is decoded in training.

    python recipes/flow_grpo.py --config recipes/configs/flow_grpo_shapes.yaml
    accelerate launch recipes/flow_grpo.py --config recipes/configs/flow_grpo_sd35_medium.yaml --dataset_name path/to/prompts

Groups of samples share a prompt; each is trained by how its reward compares with its group (arXiv 2505.05470).
Supported: Flow-SDE, Dance-SDE and CPS as stochastic steps; random, fixed and sliding (MixGRPO) windows of them;
GRPO-Guard; KL to the initial model; step-wise credit; LoRA, QLoRA and full fine-tuning; several rewards.
Not supported: DDPM models, for which there are grpo.py and ddpo.py.

Any field of `RecipeArguments` and `DiffusionGRPOConfig` may stand in the YAML file or on the command line, which wins.
An unknown key is an error. The trained weights land in `output_dir`, their moving average in `output_dir/ema`.
A run that was killed continues with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dina_reward.alignment import DiffusionGRPOConfig
from dina_reward.recipes import RecipeArguments, align
from dina_reward.recipes.arguments import parse_command_line


def main(arguments: RecipeArguments, config: DiffusionGRPOConfig) -> None:
    """Trains, and writes weights, evaluation history and pictures to the output directory."""
    # Trainers import models, which takes seconds; a wrong configuration is reported before.
    from dina_reward.alignment import DiffusionGRPOTrainer

    align(DiffusionGRPOTrainer, arguments, config)


if __name__ == "__main__":
    main(*parse_command_line(RecipeArguments, DiffusionGRPOConfig))
