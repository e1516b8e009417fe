"""Trains a generator on what search finds with it, so that plain sampling becomes as good; no pixel is decoded in training.

    python recipes/distill_search.py --config recipes/configs/distill_search_shapes.yaml

Every generation searches prompts with the policy as it is (successive halving by default), keeps the best samples of each
prompt and trains on them under fresh noise (expert iteration; RAFT, arXiv 2304.06767, with search in place of best-of-N).
Supported: flow-matching and DDPM models; every method of `dina_reward.search` with its default settings; weights by
reward; LoRA, QLoRA and full fine-tuning; several rewards.
Not supported: columns of the prompt dataset as arguments of rewards.

Any field of `RecipeArguments` and `SearchDistillationConfig` may stand in the YAML file or on the command line, which wins.
An unknown key is an error. The trained weights land in `output_dir`, their moving average in `output_dir/ema`.
A run that was killed continues with `--resume_from_checkpoint true`.
"""

from __future__ import annotations

from dina_reward.recipes import RecipeArguments, align
from dina_reward.recipes.arguments import parse_command_line
from dina_reward.search import SearchDistillationConfig


def main(arguments: RecipeArguments, config: SearchDistillationConfig) -> None:
    """Trains, and writes weights, evaluation history and pictures to the output directory."""
    # Trainers import models, which takes seconds; a wrong configuration is reported before.
    from dina_reward.search import SearchDistillationTrainer

    align(SearchDistillationTrainer, arguments, config)


if __name__ == "__main__":
    main(*parse_command_line(RecipeArguments, SearchDistillationConfig))
