"""Evaluations as text: Markdown tables that can be read in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dina_reward.evaluation.accuracy import Accuracy
from dina_reward.evaluation.cell_tables import MAX_ROWS, cells_table, pairs_text, worst_text
from dina_reward.evaluation.cells import worst_cell
from dina_reward.evaluation.comparison import Comparison, ScorerReport, SettingReport
from dina_reward.evaluation.markdown import decimal, markdown, percent


def comparison_table(comparison: Comparison) -> str:
    """All tables of a comparison, with the tie convention and what else a reader has to know below the first."""
    parts = [
        f"# {comparison.dataset}: {comparison.pairs:,} pairs, {comparison.prompts:,} prompts",
        _settings_table(comparison),
        "\n".join(f"- {line}" for line in _explanations(comparison)),
        "## Scores\n\n" + _distribution_table(comparison),
    ]
    for column in comparison.rewards[0].settings[comparison.rewards[0].headline].by:
        if table := _column_tables(comparison.rewards, column):
            parts.append(f"## By {column}\n\n{table}")
    parts += [f"## Ensembles of {r.name}\n\n{r.advice.table()}" for r in comparison.rewards if r.advice is not None]
    return "\n\n".join(parts)


def _accuracy(accuracy: Accuracy) -> str:
    return percent(accuracy.value, accuracy.interval)


def _settings_table(comparison: Comparison) -> str:
    rows = []
    for reward in comparison.rewards:
        for name, report in reward.settings.items():
            fit = report.calibration
            numbers = [fit.expected_calibration_error, fit.brier, fit.nll] if fit else [math.nan] * 3
            ties = f"{report.accuracy.predicted_ties}"
            seconds = reward.cost.seconds_per_1000[name]
            rows.append(
                [
                    *(reward.name, name, _accuracy(report.accuracy), _worst_of_all(report)),
                    *(*map(decimal, numbers), ties, f"{seconds:.3g}"),
                ]
            )
    columns = (
        *("reward", "noise level", "accuracy % [95 % CI]", "worst part"),
        *("ECE", "Brier", "NLL", "predicted ties", "s / 1,000"),
    )
    return markdown(columns, rows)


def _worst_of_all(report: SettingReport) -> str:
    """The worst part of any column, beside the total that may hide it."""
    worst = [found for cells in report.by.values() if (found := worst_cell(cells)) is not None]
    return worst_text(*min(worst, key=lambda item: item[1].accuracy.value)) if worst else "-"


def _explanations(comparison: Comparison) -> list[str]:
    """The lines under the first table."""
    reports = [report for reward in comparison.rewards for report in reward.settings.values()]
    some = reports[0].accuracy
    average = f", averaged over {some.rankings:,} rankings" if some.rankings is not None else ""
    lines = [
        f"tie convention {comparison.ties.name!r}: {some.counted:,} of {some.pairs:,} pairs count{average}; "
        f"{some.target_ties:,} tied labels; {_threshold_line(reports)}",
        f"intervals: percentile bootstrap over prompts, {comparison.resamples:,} resamples, seed {comparison.seed}",
    ]
    for reward in comparison.rewards:
        cost = reward.cost
        kind = "GPU memory" if cost.memory_kind == "cuda" else "process memory"
        prepare = (
            f", {cost.prepare_seconds_per_1000:.3g} s / 1,000 for the VAE" if cost.prepare_seconds_per_1000 else ""
        )
        model = f"probabilities: {reward.likelihood}" if reward.likelihood else "no probabilities, so no calibration"
        if (fitted := reward.fitted_variance) is not None:
            model += (
                f" (least NLL on these pairs: variance_scale {fitted.variance_scale:.3g}, variance_offset "
                f"{fitted.variance_offset:.3g})"
            )
        lines.append(
            f"{reward.name}: {model}; {cost.samples:,} samples on {cost.device}, batches of {cost.batch_size}, peak "
            f"{kind} {cost.peak_memory / 2**20:,.0f} MiB{prepare}"
        )
    for difference in comparison.differences:
        low, high = difference.interval
        lines.append(
            f"{difference.reward[0]} ({difference.reward[1]}) minus {difference.baseline[0]} ({difference.baseline[1]}): "
            f"{100 * difference.value:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}], paired"
        )
    return lines + list(comparison.notes)


def _threshold_line(reports: Sequence) -> str:
    described = {report.threshold.describe() for report in reports}
    if len(described) == 1:
        return described.pop()
    values = [report.threshold.value for report in reports]
    return f"predicted ties: thresholds tuned for each row, {min(values):.4g} to {max(values):.4g}"


def _distribution_table(comparison: Comparison) -> str:
    rows = []
    for reward in comparison.rewards:
        for name, report in reward.settings.items():
            d = report.distribution
            quantiles = [d.quantiles[q] for q in ("0.01", "0.05", "0.5", "0.95", "0.99")]
            suggestion = (d.suggested_shift, d.suggested_scale)
            rows.append([reward.name, name, *map(decimal, (d.mean, d.std, *quantiles, *suggestion))])
    columns = (
        "reward",
        "noise level",
        "mean",
        "std",
        "1 %",
        "5 %",
        "50 %",
        "95 %",
        "99 %",
        "score_shift",
        "score_scale",
    )
    return markdown(columns, rows)


def _column_tables(rewards: Sequence[ScorerReport], column: str) -> str:
    """One table per reward, and before them, where there are several, their accuracies side by side."""
    found = [reward.settings[reward.headline].by[column] for reward in rewards]
    if len(found[0]) < 2:
        return ""
    tables = []
    if len(rewards) > 1:
        rows = [
            [name, pairs_text(cell), *(_accuracy(cells[name].accuracy) for cells in found)]
            for name, cell in list(found[0].items())[:MAX_ROWS]
        ]
        tables.append(markdown([column, "pairs", *(f"{r.name} ({r.headline})" for r in rewards)], rows))
    for reward in rewards:
        by_setting = {name: report.by[column] for name, report in reward.settings.items() if report.setting.draws == 1}
        totals = {name: report.accuracy for name, report in reward.settings.items()}
        table = cells_table(column, by_setting, totals, reward.headline)
        tables.append(f"{reward.name}, {table}" if len(rewards) > 1 else table)
    return "\n\n".join(tables)
