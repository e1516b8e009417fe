"""`dina-reward train`: preferences become a reward."""

from __future__ import annotations

import typer


def train(context: typer.Context) -> None:
    """Trains a reward from preferences: `dina-reward train --config recipe.yaml`; `--help` lists every option."""
    from dina_reward.recipes.reward_training import main

    main(context.args)
