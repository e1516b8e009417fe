"""`dina-reward demo`: the embedded world, from scores to an aligned generator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the picture and the table.")] = Path(
        "outputs/demo"
    ),
    iterations: Annotated[int, typer.Option(min=1, help="Alignment iterations.")] = 70,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
) -> None:
    """Aligns the embedded generator with the embedded reward on the CPU, in minutes, and shows what happened."""
    from dina_reward.cli.demo_run import run_demo

    run_demo(output, iterations=iterations, seed=seed)
