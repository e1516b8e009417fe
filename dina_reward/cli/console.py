"""What commands share: how rewards and pipelines are named, and what is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from dina_reward.recipes.alignment import WORLDS
from dina_reward.shapes.shipped import weights_dir


def reward_path(name: str) -> str:
    """Path or id of a reward; ``shapes`` and ``shapes-ddpm`` ship with the package."""
    return _shipped_path(name, "-reward")


def pipeline_path(name: str) -> str:
    """Path or id of a pipeline; ``shapes`` and ``shapes-ddpm`` ship with the package."""
    return _shipped_path(name, "")


def _shipped_path(name: str, suffix: str) -> str:
    return str(weights_dir(WORLDS[name] + suffix)) if name in WORLDS else name


def in_terminal() -> bool:
    """Whether progress bars have a place to be drawn: in files and pipes they would be line after line."""
    return sys.stderr.isatty()


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table to the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
