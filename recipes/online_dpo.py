"""Aligns a generator with a latent reward by online Diffusion-DPO; no pixel is decoded in training.

    python recipes/online_dpo.py --config recipes/configs/online_dpo_shapes.yaml

The policy samples groups, and the best of each are preferred to its worst (arXiv 2311.12908; Flow-DPO, arXiv 2501.13918).
A dataset with the columns `prompt`, `chosen` and `rejected` (clean latents) and `num_generations: 2` is trained on as it is.
Supported: flow-matching and DDPM models; sigmoid, IPO and soft (Thurstone) losses; several pairs per group; LoRA, QLoRA
and full fine-tuning; several rewards.
Not supported: pairs of images; encode them first, or train a reward on them with train_reward.py.

Any field of `RecipeArguments` and `OnlineDPOConfig` may stand in the YAML file or on the command line, which wins.
An unknown key is an error. The trained weights land in `output_dir`, their moving average in `output_dir/ema`.
A run that was killed continues with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dina_reward.alignment import OnlineDPOConfig
from dina_reward.recipes import RecipeArguments, align
from dina_reward.recipes.arguments import parse_command_line


def main(arguments: RecipeArguments, config: OnlineDPOConfig) -> None:
    """Trains, and writes weights, evaluation history and pictures to the output directory."""
    # Trainers import models, which takes seconds; a wrong configuration is reported before.
    from dina_reward.alignment import OnlineDPOTrainer

    align(OnlineDPOTrainer, arguments, config)


if __name__ == "__main__":
    main(*parse_command_line(RecipeArguments, OnlineDPOConfig))
