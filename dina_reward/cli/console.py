"""What commands share: what is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence


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
