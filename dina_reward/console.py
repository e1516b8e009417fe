"""What commands share: how a reward is named, and how a table is printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


SHIPPED_REWARD = "shapes"


def reward_path(name: str) -> str:
    """Path or id of a reward; ``shapes`` is the one that ships with the package."""
    if name != SHIPPED_REWARD:
        return name
    from dina_reward.shapes import weights_dir

    return str(weights_dir("flow-reward"))


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
