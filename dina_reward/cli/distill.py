"""`dina-reward distill`: a judge becomes a reward."""

from __future__ import annotations

from typing import Annotated

import typer


def distill(
    context: typer.Context,
    pipeline: Annotated[
        str, typer.Argument(help="Path or hub id of a diffusers pipeline, or 'shapes'.", show_default=False)
    ] = "--help",
) -> None:
    """Makes a latent reward of a pipeline's samples and a judge's opinion of them.

    `dina-reward distill PIPELINE --judge my_module:my_judge --prompts prompts.txt --budget 2000`; `shapes --help` lists
    every option. Started again, it goes on where it was.
    """
    if pipeline in ("--help", "-h"):
        typer.echo(context.get_help())
        return
    from dina_reward.recipes.distillation import main

    # With a configuration first, the pipeline stands in it.
    main([pipeline, *context.args] if pipeline.startswith("--") else ["--model_name_or_path", pipeline, *context.args])
