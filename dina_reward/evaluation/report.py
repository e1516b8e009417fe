"""Evaluation of a latent reward on preference pairs, as one report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dina_reward.evaluation.accuracy import Accuracy, TieConvention, accuracy_by_noise
from dina_reward.evaluation.calibration import Calibration, measure_calibration
from dina_reward.evaluation.pair_scores import PairProtocol, PairScores, score_pairs


if TYPE_CHECKING:
    from dina_reward.reward import LatentReward


@dataclass(frozen=True)
class EvaluationReport:
    """Accuracy and calibration at every noise level and for the ensemble.

    Args:
        accuracy: by setting (a level such as ``"0.4"``, or ``"ensemble"``).
        calibration: by setting.
        noise_levels: the level of each single-level setting.
    """

    accuracy: dict[str, Accuracy]
    calibration: dict[str, Calibration]
    noise_levels: dict[str, float]

    @property
    def best_level(self) -> str:
        """Single level of the highest accuracy.

        Raises:
            ValueError: only an ensemble was evaluated.
        """
        if not self.noise_levels:
            raise ValueError("this evaluation has no single noise level; give noise_levels")
        return max(self.noise_levels, key=lambda setting: self.accuracy[setting].value)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Text table: one line per setting, tie convention and counts below."""
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
        return "\n".join(lines)

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
    ties: str | TieConvention = "half",
    num_bins: int = 10,
    batch_size: int = 8,
    progress: bool = True,
) -> EvaluationReport:
    """Pairwise accuracy and calibration of a reward.

    Example:
        >>> report = evaluate_preferences(reward, load_preferences("preferences"))
        >>> print(report.table())

    Args:
        reward: the reward.
        pairs: preference records (see `dina_reward.data`), any iterable.
        protocol: levels, ensemble and noise seed; defaults to the published benchmark's levels.
        ties: tie convention, see `TIE_CONVENTIONS`.
        num_bins: bins of the calibration table.
        batch_size: pairs per batch; does not change results.
        progress: show a progress bar.
    """
    scores = score_pairs(reward, pairs, protocol, batch_size=batch_size, progress=progress)
    return report_from_scores(scores, ties=ties, num_bins=num_bins)


def report_from_scores(
    scores: PairScores, *, ties: str | TieConvention = "half", num_bins: int = 10
) -> EvaluationReport:
    """Report of pairs that have been scored already."""
    settings, probabilities = scores.protocol.settings, scores.probabilities
    return EvaluationReport(
        accuracy=accuracy_by_noise(scores, ties=ties),
        calibration={
            setting: measure_calibration(probabilities[:, column], scores.p_chosen, num_bins=num_bins)
            for column, setting in enumerate(settings)
        },
        noise_levels=dict(zip(settings, scores.protocol.noise_levels, strict=False)),
    )
