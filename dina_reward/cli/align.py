"""`dina-reward align`: a generator is trained on a reward."""

from __future__ import annotations

from typing import Annotated

import typer


def align(
    context: typer.Context,
    algorithm: Annotated[
        str,
        typer.Argument(
            help="flow_grpo, grpo, ddpo, nft, online_dpo, refl, distill_search or a configuration.",
            show_default=False,
        ),
    ] = "--help",
) -> None:
    """Aligns a generator: `dina-reward align flow_grpo --config recipe.yaml`; `flow_grpo --help` lists every option.

    The same as `python recipes/flow_grpo.py --config recipe.yaml`, without a checkout. `dina-reward align flow_grpo_shapes`
    runs a configuration of `dina-reward recipes list`. On several GPUs:
    `accelerate launch --num_processes 8 -m dina_reward.cli align flow_grpo ...`.
    """
    if algorithm in ("--help", "-h"):
        typer.echo(context.get_help())
        return
    from dina_reward.recipes.alignment import main
    from dina_reward.recipes.configs import alignment_command

    main(*alignment_command(algorithm, context.args))
