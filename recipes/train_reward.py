"""Trains a latent reward on preferences: pairs of latents with prompts -> LoRA and head.

    accelerate launch recipes/train_reward.py --config recipes/configs/train_reward_shapes.yaml
    accelerate launch recipes/train_reward.py --config recipes/configs/train_reward_sd35_medium.yaml \\
        --dataset_name path/to/latents

Any field of `TrainRewardArguments` and `LatentRewardTrainingConfig` may stand in the YAML file or on the command line,
which wins; an unknown key is an error. A run that was killed continues with `--resume_from_checkpoint true`.
"""

from dina_reward.recipes.arguments import parse_command_line
from dina_reward.recipes.reward_training import TrainRewardArguments
from dina_reward.recipes.reward_training import train_reward as main
from dina_reward.training import LatentRewardTrainingConfig


if __name__ == "__main__":
    main(*parse_command_line(TrainRewardArguments, LatentRewardTrainingConfig))
