"""Aligns a DDPM generator (Stable Diffusion 1.x) with a latent reward by GRPO; no pixel is decoded in training.

    python recipes/grpo.py --config recipes/configs/grpo_shapes_ddpm.yaml
    accelerate launch recipes/grpo.py --config recipes/configs/dance_grpo_sd14.yaml \\
        --dataset_name path/to/prompts --reward_model_path path/to/reward

Groups of samples share a prompt; each is trained by how its reward compares with its group, on stochastic DDIM steps
(DanceGRPO, arXiv 2505.07818).
Supported: epsilon-, sample- and v-prediction; a random subset of the steps; KL to the initial model; step-wise credit;
LoRA, QLoRA and full fine-tuning; several rewards. Set `sde_type: ddim`.
Not supported: flow-matching models, for which there is flow_grpo.py.

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
