"""What commands share: how rewards and pipelines are named, and what is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


SHIPPED = {"shapes": "flow", "shapes-ddpm": "ddpm"}
"""Names of what ships with the package: a generator of the embedded world and its reward."""


def reward_path(name: str) -> str:
    """Path or id of a reward; ``shapes`` and ``shapes-ddpm`` ship with the package."""
    return _shipped_path(name, "-reward")


def pipeline_path(name: str) -> str:
    """Path or id of a pipeline; ``shapes`` and ``shapes-ddpm`` ship with the package."""
    return _shipped_path(name, "")


def _shipped_path(name: str, suffix: str) -> str:
    if name not in SHIPPED:
        return name
    from dina_reward.shapes import weights_dir

    return str(weights_dir(SHIPPED[name] + suffix))


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
