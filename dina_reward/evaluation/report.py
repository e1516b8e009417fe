"""Evaluation of a latent reward on preference pairs, as one report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dina_reward.checks.values import checked_int, checked_texts
from dina_reward.evaluation.accuracy import Accuracy, TieConvention, accuracy_by_noise
from dina_reward.evaluation.calibration import Calibration, measure_calibration
from dina_reward.evaluation.cell_tables import cells_table
from dina_reward.evaluation.cells import Cell, CellAnalysis
from dina_reward.evaluation.columns import select_columns
from dina_reward.evaluation.pair_scores import ENSEMBLE, PairProtocol, PairScores, score_pairs


if TYPE_CHECKING:
    from dina_reward.reward import LatentReward

_MOST_BINS, _MOST_RESAMPLES = 10_000, 1_000_000


@dataclass(frozen=True)
class EvaluationReport:
    """Accuracy and calibration at every noise level and for the ensemble.

    Args:
        accuracy: by setting (a level such as ``"0.4"``, or ``"ensemble"``).
        calibration: by setting.
        noise_levels: the level of each single-level setting.
        by: by column and setting, the figures of the pairs that share a value of the column.
    """

    accuracy: dict[str, Accuracy]
    calibration: dict[str, Calibration]
    noise_levels: dict[str, float]
    by: dict[str, dict[str, dict[str, Cell]]] = field(default_factory=dict)

    @property
    def best_level(self) -> str:
        """Single level of the highest accuracy.

        Raises:
            ValueError: only an ensemble was evaluated.
        """
        if not self.noise_levels:
            raise ValueError("this evaluation has no single noise level; give noise_levels")
        return max(self.noise_levels, key=lambda setting: self.accuracy[setting].value)

    @property
    def headline(self) -> str:
        """The setting that stands for the reward where only one can: the ensemble, or the best level where there is none."""
        return ENSEMBLE if ENSEMBLE in self.accuracy else self.best_level

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Text table: one line per setting, tie convention and counts below; then a Markdown table for each column."""
        lines = [f"{'noise level':>12}  {'accuracy':>14}  {'NLL':>6}  {'Brier':>6}  {'ECE':>6}"]
        for setting, accuracy in self.accuracy.items():
            fit = self.calibration[setting]
            lines.append(
                f"{setting:>12}  {100 * accuracy.value:6.2f} ± {100 * accuracy.standard_error:4.2f} %  {fit.nll:6.3f}  "
                f"{fit.brier:6.3f}  {fit.expected_calibration_error:6.3f}"
            )
        some = next(iter(self.accuracy.values()))
        lines.append(
            f"{some.counted} of {some.pairs} pairs count, {some.target_ties} tied labels; "
            f"tie convention {some.convention!r}"
        )
        return "\n\n".join(["\n".join(lines), *(self.cells_table(column) for column in self.by)])

    def cells_table(self, column: str, setting: str | None = None) -> str:
        """Markdown table of the parts of a column: pairs, accuracy, margin and calibration error; the total and the worst
        part above it.

        Args:
            column: one of those the report was made ``by``.
            setting: whose interval, margin and calibration error are shown; of the others the accuracy. Default: the
                ensemble, or the best level where there is none.

        Raises:
            ValueError: there is no such column or setting.
        """
        setting = setting or self.headline
        if column not in self.by or setting not in self.accuracy:
            raise ValueError(
                f"no column {column!r} at {setting!r}; this report has the columns {', '.join(self.by) or 'none'} and the "
                f"settings {', '.join(self.accuracy)}"
            )
        return cells_table(column, self.by[column], self.accuracy, setting)

    def calibration_table(self, setting: str) -> str:
        """Text table of one setting: predicted confidence against observed frequency.

        Raises:
            ValueError: there is no such setting.
        """
        if setting not in self.calibration:
            raise ValueError(f"no setting {setting!r}; this report has {', '.join(self.calibration)}")
        lines = [f"{'confidence':>13}  {'pairs':>6}  {'predicted':>9}  {'observed':>8}"]
        for row in self.calibration[setting].bins:
            numbers = f"{row.confidence:9.3f}  {row.frequency:8.3f}" if row.count else f"{'-':>9}  {'-':>8}"
            lines.append(f"{row.low:6.3f}-{row.high:6.3f}  {row.count:6d}  {numbers}")
        return "\n".join(lines)


def evaluate_preferences(
    reward: LatentReward,
    pairs: Iterable[Mapping[str, Any]],
    protocol: PairProtocol | None = None,
    *,
    by: str | Sequence[str] = (),
    ties: str | TieConvention = "half",
    num_bins: int = 10,
    resamples: int = 1000,
    batch_size: int = 8,
    progress: bool = True,
) -> EvaluationReport:
    """Pairwise accuracy and calibration of a reward.

    Example:
        >>> report = evaluate_preferences(reward, load_preferences("preferences"), by="prompt")
        >>> print(report.table())
        >>> accuracies = {value: cell.accuracy.value for value, cell in report.by["prompt"]["0.4"].items()}

    Args:
        reward: the reward.
        pairs: preference records (see `dina_reward.data`), any iterable.
        protocol: levels, ensemble and noise seed; defaults to the published benchmark's levels.
        by: columns of the dataset; the report has the figures of each of their values, too.
        ties: tie convention, see `TIE_CONVENTIONS`.
        num_bins: bins of the calibration table.
        resamples: of the bootstrap over prompts, for the intervals of a report ``by`` columns.
        batch_size: pairs per batch; does not change results.
        progress: show a progress bar.

    Raises:
        ValueError: no pairs, an unusable record, or a column that the dataset lacks; the message names those it has.
    """
    columns = () if isinstance(by, (list, tuple)) and not by else tuple(checked_texts("by", by))
    TieConvention.named(ties)
    checked_int("num_bins", num_bins, 1, _MOST_BINS)
    checked_int("resamples", resamples, 1, _MOST_RESAMPLES)
    scores = score_pairs(reward, pairs, protocol, columns=columns, batch_size=batch_size, progress=progress)
    return report_from_scores(scores, by=columns, ties=ties, num_bins=num_bins, resamples=resamples)


def report_from_scores(
    scores: PairScores,
    *,
    by: str | Sequence[str] | Mapping[str, Sequence[object]] = (),
    ties: str | TieConvention = "half",
    num_bins: int = 10,
    resamples: int = 1000,
) -> EvaluationReport:
    """Report of pairs that have been scored already.

    Example:
        >>> scores = score_pairs(reward, load_preferences("preferences"))
        >>> report = report_from_scores(scores, by="prompt")
        >>> print(report.cells_table("prompt", "0.4"))

    Args:
        scores: from `score_pairs`.
        by: columns that the scores came with, or further ones: by name, one value per pair. With columns, accuracies have
            bootstrap intervals; without, they have none.
        ties: tie convention, see `TIE_CONVENTIONS`.
        num_bins: bins of the calibration table.
        resamples: of the bootstrap over prompts.

    Raises:
        ValueError: a column is missing, or has another length than the scores.
    """
    settings, probabilities = scores.protocol.settings, scores.probabilities
    accuracy, cells = accuracy_by_noise(scores, ties=ties), {}
    columns = by if isinstance(by, Mapping) else select_columns(by, {**scores.columns, "prompt": scores.prompts})
    if columns:
        clusters = scores.prompts or range(len(scores.p_chosen))
        analysis = CellAnalysis(columns, clusters, ties=ties, resamples=resamples, num_bins=num_bins)
        for place, setting in enumerate(settings):
            accuracy[setting], cells[setting], _ = analysis.measure(
                scores.margins[:, place], scores.p_chosen, probabilities=probabilities[:, place]
            )
    return EvaluationReport(
        accuracy=accuracy,
        calibration={
            setting: measure_calibration(probabilities[:, place], scores.p_chosen, num_bins=num_bins)
            for place, setting in enumerate(settings)
        },
        noise_levels=dict(zip(settings, scores.protocol.noise_levels, strict=False)),
        by={column: {setting: cells[setting][column] for setting in settings} for column in columns},
    )
