"""`dina-reward train`: preferences become a reward."""

from __future__ import annotations

import typer


def train(context: typer.Context) -> None:
    """Trains a reward from preferences: `dina-reward train --config recipe.yaml`; `--help` lists every option.

    `dina-reward train train_reward_shapes` runs a configuration of `dina-reward recipes list`.
    """
    from dina_reward.recipes.reward_training import main

    main(context.args)
