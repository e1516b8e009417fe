"""The parts of a column as a Markdown table, with the total beside the worst part."""

from __future__ import annotations

from collections.abc import Mapping

from dina_reward.evaluation.accuracy import Accuracy
from dina_reward.evaluation.cells import FEW_PAIRS, Cell, worst_cell
from dina_reward.evaluation.markdown import decimal, markdown, percent


MAX_ROWS = 15
"""Rows of a table; more parts are in the JSON alone."""


def cells_table(
    column: str, by_setting: Mapping[str, Mapping[str, Cell]], totals: Mapping[str, Accuracy], setting: str
) -> str:
    """The parts of a column as Markdown, below the total and the worst part.

    Args:
        column: its name.
        by_setting: by setting and value.
        totals: accuracy of all pairs by setting.
        setting: whose interval, margin and calibration error are shown; of the others the accuracy.
    """
    cells = by_setting[setting]
    others = [name for name in by_setting if name != setting]
    rows = [
        [
            name,
            pairs_text(cell),
            percent(cell.accuracy.value, cell.accuracy.interval),
            decimal(cell.mean_margin),
            "-" if cell.calibration_error is None else decimal(cell.calibration_error),
            *(f"{100 * by_setting[other][name].accuracy.value:.1f}" for other in others),
        ]
        for name, cell in list(cells.items())[:MAX_ROWS]
    ]
    columns = (column, "pairs", f"{setting}: accuracy % [95 % CI]", "mean margin", "ECE", *others)
    lines = [f"{column}, {setting}: {total_and_worst(totals[setting], cells)}", markdown(columns, rows)]
    if any(cell.few for cell in cells.values()):
        lines.append(f"few: fewer than {FEW_PAIRS} pairs count; such figures say little.")
    if len(cells) > MAX_ROWS:
        lines.append(f"{len(cells) - MAX_ROWS} more, of fewer pairs, are in the JSON file.")
    return "\n\n".join(lines)


def total_and_worst(total: Accuracy, cells: Mapping[str, Cell]) -> str:
    """``90.1 % overall; worst: shape 51.0 % of 212 pairs``."""
    text, worst = f"{100 * total.value:.1f} % overall", worst_cell(cells)
    if worst is not None:
        return f"{text}; worst: {worst_text(*worst)}"
    return text if len(cells) < 2 else f"{text}; no part has {FEW_PAIRS} pairs"


def worst_text(name: str, cell: Cell) -> str:
    """``shape 51.0 % of 212 pairs``."""
    return f"{name} {100 * cell.accuracy.value:.1f} % of {cell.accuracy.counted:,} pairs"


def pairs_text(cell: Cell) -> str:
    """The number of pairs, with a remark where few of them count."""
    return f"{cell.accuracy.pairs}{' (few)' if cell.few else ''}"
