"""`dina-reward recipes`: what configurations there are, what is in one, and whether one is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(help="Alignment and training recipes: list, show, validate.", no_args_is_help=True)

DirectoryOption = Annotated[
    Path | None,
    typer.Option(help="The recipes directory. Default: ./recipes, or the package's own.", file_okay=False),
]


@app.command("list")
def list_configs(directory: DirectoryOption = None) -> None:
    """Lists all configurations: name, recipe, model, what it is."""
    from rich.console import Console
    from rich.table import Table

    from dina_reward.recipes.configs import configs_of, find_directory

    table = Table(box=None)
    for column in ("configuration", "recipe"):
        table.add_column(column, no_wrap=True)
    for column in ("model", "what it is"):
        table.add_column(column)
    for config in configs_of(find_directory(directory)):
        launch = config.launch
        table.add_row(config.name, launch.recipe if launch else "", config.model.rpartition("/")[2], config.title)
    # Lines that go into a file or a pipe are not broken.
    Console(width=None if Console().is_terminal else 250).print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a configuration, or path of a file.")],
    directory: DirectoryOption = None,
) -> None:
    """Prints a configuration."""
    from dina_reward.recipes.configs import find_config

    typer.echo(find_config(name, directory).path.read_text(encoding="utf-8"), nl=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def validate(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="Path of a configuration, or its name in the list.")],
    num_processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that will be started. Default: those of the file's launch line."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe that the file is for. Default: the script of the file's launch line.")
    ] = None,
    directory: DirectoryOption = None,
) -> None:
    """Checks keys, types, values and batches of a configuration without touching a weight.

    The file is checked with the options of its 'Launch:' line; further ones may follow, as in a run: --beta 0.
    """
    from dina_reward.recipes.configs import check_config, find_config

    found = find_config(config, directory)
    typer.echo(
        check_config(found, recipe=recipe, num_processes=num_processes, overrides=context.args, directory=directory)
    )
