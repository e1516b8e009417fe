"""Aligns a generator with a latent reward by DiffusionNFT; no pixel is decoded in training.

    python recipes/nft.py --config recipes/configs/nft_shapes.yaml

Samples are noised afresh; the prediction is pulled towards good ones and pushed away from bad ones (arXiv 2509.16117).
There are no log-probabilities, so any sampler will do and no trajectory is kept.
Supported: flow-matching and DDPM models; a soft copy of the policy that samples; KL to the initial model; LoRA, QLoRA and
full fine-tuning; several rewards.

Any field of `RecipeArguments` and `DiffusionNFTConfig` may stand in the YAML file or on the command line, which wins.
An unknown key is an error. The trained weights land in `output_dir`, their moving average in `output_dir/ema`.
A run that was killed continues with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dina_reward.alignment import DiffusionNFTConfig
from dina_reward.recipes import RecipeArguments, align
from dina_reward.recipes.arguments import parse_command_line


def main(arguments: RecipeArguments, config: DiffusionNFTConfig) -> None:
    """Trains, and writes weights, evaluation history and pictures to the output directory."""
    # Trainers import models, which takes seconds; a wrong configuration is reported before.
    from dina_reward.alignment import DiffusionNFTTrainer

    align(DiffusionNFTTrainer, arguments, config)


if __name__ == "__main__":
    main(*parse_command_line(RecipeArguments, DiffusionNFTConfig))
