"""Aligns a generator by back-propagating a latent reward through the last sampler steps; no pixel is decoded in training.

    python recipes/refl.py --config recipes/configs/refl_shapes.yaml
    accelerate launch recipes/refl.py --config recipes/configs/refl_sd35_medium.yaml --dataset_name path/to/prompts

The reward of a predicted clean latent is differentiated, so its gradient says how to change a sample, where GRPO only learns
which sample is better. `method` is refl (one random late step, arXiv 2304.05977), draft (the last steps, arXiv 2309.17400)
or drtune (steps spread over the rollout whose inputs are held constant, arXiv 2405.00760).
Supported: flow-matching and DDPM models; guidance of its own at the gradient steps; hinge loss; a penalty on the distance to
the initial model; LoRA, QLoRA and full fine-tuning; several differentiable rewards.
Not supported: rewards of pixels.

Any field of `RecipeArguments` and `RewardBackpropConfig` may stand in the YAML file or on the command line, which wins.
An unknown key is an error. The trained weights land in `output_dir`, their moving average in `output_dir/ema`.
A run that was killed continues with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dina_reward.alignment import RewardBackpropConfig
from dina_reward.recipes import RecipeArguments, align
from dina_reward.recipes.arguments import parse_command_line


def main(arguments: RecipeArguments, config: RewardBackpropConfig) -> None:
    """Trains, and writes weights, evaluation history and pictures to the output directory."""
    # Trainers import models, which takes seconds; a wrong configuration is reported before.
    from dina_reward.alignment import RewardBackpropTrainer

    align(RewardBackpropTrainer, arguments, config)


if __name__ == "__main__":
    main(*parse_command_line(RecipeArguments, RewardBackpropConfig))
