"""One page of plots of a comparison: accuracy by level, reliability, score distribution, accuracy by column."""

from __future__ import annotations

import os
from textwrap import shorten
from typing import Any

import numpy as np

from dina_reward.evaluation.accuracy import Accuracy
from dina_reward.evaluation.comparison import Comparison, ScorerReport, SettingReport
from dina_reward.evaluation.plots import accuracy_rows, cell_label


COLORS = ("#20639b", "#c8553d", "#3c896d", "#8e5ea2", "#b8860b", "#4d4d4d", "#17becf", "#d16ba5")
_MAX_ROWS = 12
_DRAW_STYLES = ("-", "--", ":", "-.")


def plot_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Writes the page; the suffix of ``path`` chooses the format (png, pdf, svg).

    Bars and bands are 95 % confidence intervals. Each reward is shown with its headline setting where only one can be.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = _columns_with_parts(comparison)
    more = -(-max(len(shown) - 1, 0) // 2)
    figure: Any = Figure(figsize=(13, 9.5 + 4.2 * more), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    top, bottom, *further = figure.subfigures(2 + more, 1, squeeze=False)[:, 0]
    ensembles = _ensemble_names(comparison)
    if ensembles:
        axes = top.subplots(1, 3, width_ratios=(2.4, max(1.1, 0.45 * len(ensembles)), 2.2))
        axes[1].sharey(axes[0])
        _ensemble_panel(axes[1], comparison, ensembles)
    else:
        axes = top.subplots(1, 2)
    _level_panel(axes[0], comparison)
    _reliability_panel(axes[-1], comparison)
    left, right = bottom.subplots(1, 2, width_ratios=(2.4, 3.3))
    _distribution_panel(left, comparison)
    _cells_panel(right, comparison, shown[0])
    for row, columns in zip(further, (shown[i : i + 2] for i in range(1, len(shown), 2)), strict=True):
        for axis, column in zip(row.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
            _cells_panel(axis, comparison, column)
    figure.suptitle(
        f"{shorten(comparison.dataset, 70, placeholder='...')}: {comparison.pairs:,} pairs of "
        f"{comparison.prompts:,} prompts, tie convention {comparison.ties.name!r}, 95 % bootstrap intervals",
        fontsize=12,
    )
    handles = [_handle(number) for number in range(len(comparison.rewards))]
    names = [shorten(f"{reward.name} (headline: {reward.headline})", 70) for reward in comparison.rewards]
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)), frameon=False)
    figure.savefig(path, dpi=130)


def _columns_with_parts(comparison: Comparison) -> list[str]:
    """Columns of more than one value; one of those with a single value where there are no others."""
    first = comparison.rewards[0]
    by = first.settings[first.headline].by
    return [name for name, cells in by.items() if len(cells) > 1] or [name for name, cells in by.items() if cells][:1]


def _level_panel(axes: Any, comparison: Comparison) -> None:
    """Accuracy of every single level; functions without noise are horizontal lines."""
    draws = sorted({r.setting.draws for reward in comparison.rewards for r in reward.settings.values()})
    for number, reward in enumerate(comparison.rewards):
        color = COLORS[number % len(COLORS)]
        for style, count in enumerate(draws):
            reports = [r for r in reward.settings.values() if len(r.setting.levels) == 1 and r.setting.draws == count]
            reports.sort(key=lambda report: report.setting.levels)
            if reports:
                offset = 0.005 * (number - (len(comparison.rewards) - 1) / 2) + 0.012 * style
                levels = [report.setting.levels[0] + offset for report in reports]
                values, errors = _values([report.accuracy for report in reports])
                dashes = _DRAW_STYLES[style % len(_DRAW_STYLES)]
                axes.errorbar(
                    levels, values, yerr=errors, marker="o", ms=4, lw=1.4, capsize=2.5, ls=dashes, color=color
                )
        if "score" in reward.settings:
            result = reward.settings["score"].accuracy
            axes.axhline(100 * result.value, color=color, lw=1.4, ls="-")
            if result.interval is not None:
                axes.axhspan(*(100 * bound for bound in result.interval), color=color, alpha=0.1, lw=0)
    axes.set(xlabel=r"noise level $\sigma$", ylabel="pairwise accuracy (%)", title="Accuracy by noise level")
    if len(draws) > 1:
        styles = [_handle(0, _DRAW_STYLES[style % len(_DRAW_STYLES)], "0.3") for style in range(len(draws))]
        names = [f"{count} draw{'s' * (count > 1)}" for count in draws]
        axes.legend(styles, names, loc="upper center", ncols=4, frameon=False, fontsize=9)
    _leave_room(axes, 0.12 if len(draws) > 1 else 0.04)
    axes.grid(alpha=0.3)


def _leave_room(axes: Any, share: float) -> None:
    """Empty space above the data for a legend, and no ticks above 100 %."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + share * (high - low))
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 100])


def _ensemble_panel(axes: Any, comparison: Comparison, names: list[str]) -> None:
    """Accuracy of the ensembles; fuller markers stand for fewer noise draws."""
    draws = sorted({r.setting.draws for reward in comparison.rewards for r in reward.settings.values()})
    columns = len(comparison.rewards) * len(draws)
    for number, reward in enumerate(comparison.rewards):
        color = COLORS[number % len(COLORS)]
        if "score" in reward.settings:
            axes.axhline(100 * reward.settings["score"].accuracy.value, color=color, lw=1.4)
        for style, count in enumerate(draws):
            reports = {r.setting.levels_name: r for r in reward.settings.values() if r.setting.draws == count}
            present = [index for index, name in enumerate(names) if name in reports]
            if present:
                values, errors = _values([reports[names[index]].accuracy for index in present])
                offset = 0.7 * ((number * len(draws) + style + 0.5) / columns - 0.5)
                places = [index + offset for index in present]
                axes.errorbar(
                    places,
                    values,
                    yerr=errors,
                    fmt="D",
                    ms=5,
                    capsize=2.5,
                    color=color,
                    mfc="white" if style else color,
                )
    rotation = 90 if len(names) > 1 else 0
    axes.set_xticks(range(len(names)), [_short_levels(name) for name in names], rotation=rotation, fontsize=8)
    axes.set(title="Ensembles" if len(draws) == 1 else "Ensembles (hollow: more draws)", xlim=(-0.6, len(names) - 0.4))
    axes.tick_params(labelleft=False)
    axes.grid(alpha=0.3, axis="y")


def _reliability_panel(axes: Any, comparison: Comparison) -> None:
    """The headline setting of each reward; of a single reward every level, too."""
    axes.plot([0.5, 1], [0.5, 1], color="0.6", ls=":", lw=1.5, label="perfect")
    only = comparison.rewards[0] if len(comparison.rewards) == 1 else None
    if only is not None:
        _level_curves(axes, only)
    for number, reward in enumerate(comparison.rewards):
        report = reward.settings[reward.headline]
        if report.calibration is not None:
            error = report.calibration.expected_calibration_error
            name = f"{shorten(reward.name, 24, placeholder='...')}, ECE {error:.3f}"
            _curve(axes, report, color=COLORS[number % len(COLORS)], label=name, lw=1.8, sized=True)
    axes.set(
        xlabel="predicted probability of the preferred side",
        ylabel="observed frequency",
        title="Reliability (marker area: pairs)",
        xlim=(0.48, 1.02),
    )
    axes.set_ylim(bottom=max(0.0, min(0.45, axes.get_ylim()[0])), top=1.03)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8, framealpha=0.8, edgecolor="none")


def _level_curves(axes: Any, reward: ScorerReport) -> None:
    from matplotlib import colormaps

    reports = [r for r in reward.settings.values() if len(r.setting.levels) == 1 and r.setting.draws == 1]
    for report in reports:
        color = colormaps["viridis"](0.9 * report.setting.levels[0])
        assert report.calibration is not None
        error = report.calibration.expected_calibration_error
        _curve(
            axes, report, color=color, label=rf"$\sigma$ = {report.setting.name}, ECE {error:.3f}", lw=1, sized=False
        )


def _curve(axes: Any, report: SettingReport, *, color: Any, label: str, lw: float, sized: bool) -> None:
    assert report.calibration is not None
    bins = [row for row in report.calibration.bins if row.count]
    x, y = [row.confidence for row in bins], [row.frequency for row in bins]
    axes.plot(x, y, color=color, lw=lw, label=label, alpha=0.9)
    if sized:
        total = sum(row.count for row in bins)
        axes.scatter(x, y, s=[8 + 250 * row.count / total for row in bins], color=color, alpha=0.55, lw=0)


def _distribution_panel(axes: Any, comparison: Comparison) -> None:
    """Histograms of the headline scores, moved and scaled as the suggestion does."""
    for number, reward in enumerate(comparison.rewards):
        d = reward.settings[reward.headline].distribution
        if not d.std > 0:
            continue
        edges = (np.linspace(d.minimum, d.maximum, len(d.histogram) + 1) - d.mean) / d.std
        density = np.array(d.histogram) / (d.count * np.diff(edges))
        name = shorten(reward.name, 24, placeholder="...")
        label = f"{name}: shift {d.suggested_shift:.3g}, scale {d.suggested_scale:.3g}"
        color = COLORS[number % len(COLORS)]
        axes.stairs(density, edges, color=color, lw=1.5, label=label)
        axes.stairs(density, edges, color=color, alpha=0.12, fill=True)
    axes.set(xlabel="(score + shift) / scale", ylabel="density", title="Distribution of scores")
    axes.set_ylim(top=axes.get_ylim()[1] * (1.05 + 0.07 * len(comparison.rewards)))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", fontsize=8)


def _cells_panel(axes: Any, comparison: Comparison, column: str) -> None:
    """Accuracy of the parts of a column."""
    first = comparison.rewards[0]
    cells = dict(list(first.settings[first.headline].by[column].items())[:_MAX_ROWS])
    for number, reward in enumerate(comparison.rewards):
        results = [reward.settings[reward.headline].by[column][name].accuracy for name in cells]
        offset = 0.6 / len(comparison.rewards) * (number - (len(comparison.rewards) - 1) / 2)
        accuracy_rows(axes, results, color=COLORS[number % len(COLORS)], offset=offset)
        total = reward.settings[reward.headline].accuracy.value
        axes.axvline(100 * total, color=COLORS[number % len(COLORS)], ls=":", lw=1.2)
    axes.set_yticks(range(len(cells)), [cell_label(name, cell) for name, cell in cells.items()], fontsize=9)
    axes.set_ylim(len(cells) - 0.4, -0.6)
    left_out = len(first.settings[first.headline].by[column]) - len(cells)
    more = f"; {left_out} smaller ones are in the JSON" if left_out else ""
    axes.set(xlabel="pairwise accuracy (%)", title=f"Accuracy by {column} (pairs{more}; dotted: all)")
    axes.grid(alpha=0.3)


def _values(results: list[Accuracy]) -> tuple[np.ndarray, np.ndarray]:
    """Accuracies in per cent, and the distances to the bounds of their intervals, shape ``(2, results)``."""
    values = np.array([100 * result.value for result in results])
    bounds = np.array([[100 * bound for bound in result.interval or (np.nan, np.nan)] for result in results])
    return values, np.nan_to_num(np.abs(bounds.reshape(-1, 2).T - values))


def _ensemble_names(comparison: Comparison) -> list[str]:
    reports = (r for reward in comparison.rewards for r in reward.settings.values() if r.setting.is_ensemble)
    return list(dict.fromkeys(report.setting.levels_name for report in reports))


def _short_levels(name: str) -> str:
    levels, _, rest = name.partition(" ")
    if levels.count("+") > 3:
        parts = levels.split("+")
        levels = f"{parts[0]}+...+{parts[-1]} ({len(parts)})"
    return f"{levels}\n{rest}"


def _handle(number: int, style: str = "-", color: str | None = None) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color or COLORS[number % len(COLORS)], ls=style, lw=2, marker=None if color else "o")
