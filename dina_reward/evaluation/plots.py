"""Pictures of an evaluation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import numpy as np

from dina_reward.evaluation.accuracy import Accuracy
from dina_reward.evaluation.cells import Cell
from dina_reward.evaluation.pair_scores import ENSEMBLE
from dina_reward.evaluation.report import EvaluationReport


_COLOR, _ENSEMBLE_COLOR = "#20639b", "#c8553d"
_MAX_CELLS, _NAME_LENGTH = 12, 38


def plot_evaluation(report: EvaluationReport, path: str | os.PathLike[str], setting: str | None = None) -> None:
    """Writes one picture: accuracy by noise level on the left, reliability diagram on the right; below, for each column that
    the report is by, accuracy of its parts with intervals, and over the noise level.

    Args:
        report: the evaluation.
        path: file to write; its suffix chooses the format.
        setting: setting of the reliability diagram; default the ensemble, or the best level where there is none.
    """
    from matplotlib.figure import Figure

    setting = setting or report.headline
    figure = Figure(figsize=(9.5, 4.2 * (1 + len(report.by))), layout="constrained")
    rows = figure.subplots(1 + len(report.by), 2, squeeze=False)
    _accuracy_panel(rows[0, 0], report)
    _reliability_panel(rows[0, 1], report, setting)
    for (left, right), column in zip(rows[1:], report.by, strict=True):
        _cell_panels(left, right, report, column, setting)
    figure.savefig(path, dpi=150)


def _cell_panels(left: Any, right: Any, report: EvaluationReport, column: str, setting: str) -> None:
    """Accuracy of the parts of a column: in one setting with intervals, and of those with many pairs by noise level."""
    cells = dict(list(report.by[column][setting].items())[:_MAX_CELLS])
    names = list(cells)
    accuracy_rows(left, [cells[name].accuracy for name in names], color=_COLOR)
    left.axvline(100 * report.accuracy[setting].value, color="0.5", linestyle=":")
    left.set_yticks(range(len(names)), [cell_label(name, cells[name]) for name in names], fontsize=8)
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set(xlabel="pairwise accuracy (%)", title=f"Accuracy by {column}, {setting} (pairs; dotted: all)")
    levels = sorted(report.noise_levels, key=report.noise_levels.__getitem__)
    for name in names:
        if levels and not cells[name].few:
            values = [100 * report.by[column][level][name].accuracy.value for level in levels]
            right.plot([report.noise_levels[level] for level in levels], values, marker="o", ms=3, label=name)
    right.set(
        xlabel=r"noise level $\sigma$", ylabel="pairwise accuracy (%)", title=f"The same by noise level ({column})"
    )
    if right.lines:
        right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)


def cell_label(name: str, cell: Cell) -> str:
    """For an axis: the name, shortened, and the number of pairs, with a remark where they are few."""
    remark = ", few" if cell.few else ""
    return f"{shorten(name, _NAME_LENGTH, placeholder='...')} ({cell.accuracy.pairs:,}{remark})"


def accuracy_rows(axes: Any, results: Sequence[Accuracy], *, color: str, offset: float = 0.0) -> None:
    """One horizontal interval per accuracy, from the top down, in per cent."""
    values = np.array([100 * result.value for result in results])
    bounds = np.array([[100 * bound for bound in result.interval or (np.nan, np.nan)] for result in results])
    errors = np.nan_to_num(np.abs(bounds.reshape(-1, 2).T - values))
    places = np.arange(len(results)) + offset
    axes.errorbar(values, places, xerr=errors, fmt="o", ms=4, capsize=2.5, color=color)


def _accuracy_panel(axes: Any, report: EvaluationReport) -> None:
    settings = sorted(report.noise_levels, key=report.noise_levels.__getitem__)
    results = [report.accuracy[setting] for setting in settings]
    axes.errorbar(
        [report.noise_levels[setting] for setting in settings],
        [100 * result.value for result in results],
        yerr=[100 * result.standard_error for result in results],
        marker="o",
        capsize=3,
        color=_COLOR,
        label="one level",
    )
    if ENSEMBLE in report.accuracy:
        axes.axhline(100 * report.accuracy[ENSEMBLE].value, color=_ENSEMBLE_COLOR, linestyle="--", label="ensemble")
    axes.set(xlabel=r"noise level $\sigma$", ylabel="pairwise accuracy (%)", title="Accuracy by noise level")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _reliability_panel(axes: Any, report: EvaluationReport, setting: str) -> None:
    result = report.calibration[setting]
    bins = [row for row in result.bins if row.count]
    total = sum(row.count for row in bins)
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linestyle=":", label="perfect")
    axes.scatter(
        [row.confidence for row in bins],
        [row.frequency for row in bins],
        s=[20 + 400 * row.count / total for row in bins],
        color=_COLOR,
        alpha=0.8,
        label="observed (area: pairs)",
    )
    name = "ensemble" if setting == ENSEMBLE else rf"$\sigma$ = {setting}"
    axes.set(
        xlabel="predicted probability",
        ylabel="observed frequency",
        title=f"Calibration, {name} (ECE {result.expected_calibration_error:.3f})",
        xlim=(0.48, 1.02),
        ylim=(0, 1.05),
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
