"""Aligns a DDPM generator (Stable Diffusion 1.x) with a latent reward by DDPO; no pixel is decoded in training.

    python recipes/ddpo.py --config recipes/configs/ddpo_shapes.yaml
    accelerate launch recipes/ddpo.py --config recipes/configs/ddpo_sd14.yaml \\
        --dataset_name path/to/prompts --reward_model_path path/to/reward

Samples are independent; each is trained by how its reward compares with earlier ones of its prompt (arXiv 2305.13301).
Supported: importance sampling (DDPO-IS, `loss_type: ppo_clip`) and the score function (DDPO-SF, `loss_type:
policy_gradient`); epsilon-, sample- and v-prediction; LoRA, QLoRA and full fine-tuning; several rewards.
Not supported: flow-matching models, for which there is flow_grpo.py.

Any field of `RecipeArguments` and `DDPOConfig` may stand in the YAML file or on the command line, which wins.
An unknown key is an error. The trained weights land in `output_dir`, their moving average in `output_dir/ema`.
A run that was killed continues with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dina_reward.alignment import DDPOConfig
from dina_reward.recipes import RecipeArguments, align
from dina_reward.recipes.arguments import parse_command_line


def main(arguments: RecipeArguments, config: DDPOConfig) -> None:
    """Trains, and writes weights, evaluation history and pictures to the output directory."""
    # Trainers import models, which takes seconds; a wrong configuration is reported before.
    from dina_reward.alignment import DDPOTrainer

    align(DDPOTrainer, arguments, config)


if __name__ == "__main__":
    main(*parse_command_line(RecipeArguments, DDPOConfig))
