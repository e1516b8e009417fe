"""Pictures of an evaluation."""

from __future__ import annotations

import os
from typing import Any

from dina_reward.evaluation.pair_scores import ENSEMBLE
from dina_reward.evaluation.report import EvaluationReport


_COLOR, _ENSEMBLE_COLOR = "#20639b", "#c8553d"


def plot_evaluation(report: EvaluationReport, path: str | os.PathLike[str], setting: str | None = None) -> None:
    """Writes one picture: accuracy by noise level on the left, reliability diagram on the right.

    Args:
        report: the evaluation.
        path: file to write; its suffix chooses the format.
        setting: setting of the reliability diagram; default the ensemble, or the best level where there is none.
    """
    from matplotlib.figure import Figure

    if setting is None:
        setting = ENSEMBLE if ENSEMBLE in report.calibration else report.best_level
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _accuracy_panel(left, report)
    _reliability_panel(right, report, setting)
    figure.savefig(path, dpi=150)


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
