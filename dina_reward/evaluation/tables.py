"""A comparison as text: Markdown tables that can be read in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dina_reward.evaluation.accuracy import Accuracy
from dina_reward.evaluation.comparison import Comparison, ScorerReport


_MAX_ROWS = 15


def comparison_table(comparison: Comparison) -> str:
    """All tables of a comparison, with the tie convention and what else a reader has to know below the first."""
    parts = [
        f"# {comparison.dataset}: {comparison.pairs:,} pairs, {comparison.prompts:,} prompts",
        _settings_table(comparison),
        "\n".join(f"- {line}" for line in _explanations(comparison)),
        "## Scores\n\n" + _distribution_table(comparison),
    ]
    for title, attribute in (("source", "by_source"), ("resolution", "by_resolution")):
        if table := _slices_table(comparison.rewards, title, attribute):
            parts.append(f"## Accuracy by {title} (%), headline setting\n\n{table}")
    return "\n\n".join(parts)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, numbers to the right."""
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(columns))]
    left = [any(row[index][:1].isalpha() for row in cells[1:]) or index == 0 for index in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        texts = (t.ljust(w) if side else t.rjust(w) for t, w, side in zip(row, widths, left, strict=True))
        return "| " + " | ".join(texts) + " |"

    rule = (
        "|"
        + "|".join("-" * (w + 2) if side else "-" * (w + 1) + ":" for w, side in zip(widths, left, strict=True))
        + "|"
    )
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """``82.13 [81.20, 83.01]``: a share and its interval in per cent."""
    text = f"{100 * value:.2f}"
    if interval is None or any(math.isnan(bound) for bound in interval):
        return text
    low, high = interval
    return f"{text} [{100 * low:.2f}, {100 * high:.2f}]"


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
                [reward.name, name, _accuracy(report.accuracy), *map(_decimal, numbers), ties, f"{seconds:.3g}"]
            )
    columns = ("reward", "noise level", "accuracy % [95 % CI]", "ECE", "Brier", "NLL", "predicted ties", "s / 1,000")
    return markdown(columns, rows)


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
            rows.append([reward.name, name, *map(_decimal, (d.mean, d.std, *quantiles, *suggestion))])
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


def _slices_table(rewards: Sequence[ScorerReport], title: str, attribute: str) -> str:
    found = [getattr(reward.settings[reward.headline], attribute) for reward in rewards]
    if len(found[0]) < 2:
        return ""
    names = sorted(found[0], key=lambda name: -found[0][name].pairs)
    rows = [
        [name, f"{found[0][name].pairs}", *(_accuracy(group[name]) for group in found)] for name in names[:_MAX_ROWS]
    ]
    more = f"\n\n{len(names) - _MAX_ROWS} more are in the JSON file." if len(names) > _MAX_ROWS else ""
    return markdown([title, "pairs", *(f"{reward.name} ({reward.headline})" for reward in rewards)], rows) + more


def _decimal(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
