"""Several rewards side by side on one dataset: accuracy with confidence intervals, calibration, slices, cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dina_reward.data.preference import Preference
from dina_reward.evaluation.accuracy import Accuracy, TieConvention
from dina_reward.evaluation.calibration import Calibration, measure_calibration
from dina_reward.evaluation.cells import CellAnalysis, Cells
from dina_reward.evaluation.columns import select_columns
from dina_reward.evaluation.cost import Cost
from dina_reward.evaluation.distribution import ScoreDistribution, describe_scores
from dina_reward.evaluation.ensemble_advice import EnsembleAdvice
from dina_reward.evaluation.markdown import plain
from dina_reward.evaluation.pair_table import PairTable
from dina_reward.evaluation.scored_pairs import ScoredPairs, score_dataset
from dina_reward.evaluation.scorers import Scorer
from dina_reward.evaluation.settings import Setting
from dina_reward.evaluation.ties import TieThreshold, tune_tie_threshold, validation_half
from dina_reward.evaluation.variance import fit_variance
from dina_reward.likelihood import ThurstoneModel


DEFAULT_COLUMNS = ("source", "resolution")
"""The columns that accuracy is reported by unless others are named."""


@dataclass(frozen=True)
class SettingReport:
    """One reward in one setting.

    Args:
        setting: levels, draws and ensemble.
        accuracy: with its bootstrap interval.
        threshold: of predicted ties.
        calibration: of the reward's likelihood; ``None`` where it has none.
        distribution: of the raw scores.
        by: by column and value, the figures of the pairs that share it.
    """

    setting: Setting
    accuracy: Accuracy
    threshold: TieThreshold
    calibration: Calibration | None
    distribution: ScoreDistribution
    by: Cells


@dataclass(frozen=True)
class ScorerReport:
    """One reward in all its settings.

    Args:
        name: of the reward.
        likelihood: model of the probabilities that calibration is measured of, ``None`` without one.
        settings: by name.
        cost: seconds and memory.
        fitted_variance: Thurstone variance of the least mean NLL over the single levels, for choosing ``variance_scale`` and
            ``variance_offset``; ``None`` for other likelihoods, for a single level, and where none fits. See `fit_variance`.
        advice: which ensemble pays, where that was asked for; see `ensemble_advice`.
    """

    name: str
    likelihood: str | None
    settings: dict[str, SettingReport]
    cost: Cost
    fitted_variance: ThurstoneModel | None = None
    advice: EnsembleAdvice | None = None

    @property
    def headline(self) -> str:
        """The setting that stands for the reward where only one can: the first ensemble, else the first setting.

        It does not depend on the results; the best of many settings would flatter the reward.
        """
        return next((name for name, r in self.settings.items() if r.setting.is_ensemble), next(iter(self.settings)))


@dataclass(frozen=True)
class Difference:
    """Difference of accuracy between two rewards on the same pairs, with a paired bootstrap interval.

    Args:
        reward, baseline: names of reward and setting.
        value: accuracy of the reward minus accuracy of the baseline.
        interval: 95 % of the resamples.
    """

    reward: tuple[str, str]
    baseline: tuple[str, str]
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Everything an evaluation found out.

    Args:
        dataset: its name.
        ties: the tie convention.
        pairs, prompts: counts; prompts are what is resampled.
        seed: of noise, resampling and tuning.
        resamples: of the bootstrap.
        rewards: in the order given.
        differences: every further reward's headline setting against the first one's.
        notes: what a reader of the numbers has to know.
    """

    dataset: str
    ties: TieConvention
    pairs: int
    prompts: int
    seed: int
    resamples: int
    rewards: tuple[ScorerReport, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON; what cannot be computed is ``None``."""
        return plain(asdict(self))


@dataclass(frozen=True)
class AnalysisOptions:
    """How scores become a report.

    Args:
        ties: tie convention.
        tie_threshold: threshold of predicted ties; ``None``: zero, or tuned where the convention says so.
        resamples: of the bootstrap.
        num_bins: of the reliability curve.
        seed: of resampling and of the half that a threshold is tuned on.
        by: columns whose values the pairs are grouped by.
    """

    ties: TieConvention
    tie_threshold: float | None = None
    resamples: int = 1000
    num_bins: int = 10
    seed: int = 0
    by: tuple[str, ...] = DEFAULT_COLUMNS


def evaluate_scorers(
    scorers: Sequence[Scorer],
    pairs: Iterable[Preference | Mapping[str, Any]],
    *,
    pipeline: Any | Sequence[Any] | None = None,
    by: str | Sequence[str] = DEFAULT_COLUMNS,
    ties: str | TieConvention = "half",
    tie_threshold: float | None = None,
    dataset: str = "preferences",
    resamples: int = 1000,
    num_bins: int = 10,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Evaluates rewards on one dataset.

    Examples:
        >>> scorers = [LatentScorer(reward), CallableScorer(ClipReward.from_pretrained("yuvalkirstain/PickScore_v1"))]
        >>> comparison = evaluate_scorers(scorers, read_preferences("pairs.json"), pipeline=pipe, ties="pickscore")
        >>> print(comparison_table(comparison))

    Args:
        scorers: with different names.
        pairs: `Preference` records or training rows; it is gone through once for every scorer, so not a generator.
        pipeline: encodes images and decodes latents; one for all, or one per scorer.
        by: columns of the dataset; accuracy, margin and calibration are reported for each of their values, too, so that a
            total hides no blind spot. ``source``, ``resolution``, ``group``, ``prompt`` and whatever else the records have.
        ties: tie convention, see `TIE_CONVENTIONS`; `BENCHMARK_TIES` has the one of each benchmark.
        tie_threshold: margins of at most this size are predicted ties. Default: zero; under a convention that tunes it
            (``pickscore``), tuned for each reward and setting on half of the prompts, and reported on the other half.
        dataset: name for the report.
        resamples: of the bootstrap.
        num_bins: of the reliability curve.
        batch_size: samples per pass.
        seed: of every draw.
        progress: show progress bars.

    Raises:
        ValueError: no scorers, repeated names, unusable pairs, a column that the dataset lacks, or a ranking convention on
            pairs without groups.
    """
    names = [scorer.name for scorer in scorers]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"rewards need different names, and there must be at least one; got {names}")
    pipelines = list(pipeline) if isinstance(pipeline, list | tuple) else [pipeline] * len(names)
    columns = (by,) if isinstance(by, str) else tuple(by)
    options: dict[str, Any] = {"columns": columns, "batch_size": batch_size, "seed": seed, "progress": progress}
    scored = [
        score_dataset(scorer, pairs, pipeline=own, **options) for scorer, own in zip(scorers, pipelines, strict=True)
    ]
    analysis = AnalysisOptions(TieConvention.named(ties), tie_threshold, resamples, num_bins, seed, columns)
    return compare(list(zip(scorers, scored, strict=True)), analysis, dataset=dataset)


def compare(
    scored: Sequence[tuple[Scorer, ScoredPairs]], options: AnalysisOptions, dataset: str = "preferences"
) -> Comparison:
    """The report of datasets that have been scored already; all must be of the same pairs."""
    table = scored[0][1].table
    if any(other.table.prompts != table.prompts or other.table.p_a != table.p_a for _, other in scored):
        raise ValueError("the rewards were scored on different pairs; score each on the same dataset")
    if options.ties.per_ranking and not all(table.groups):
        raise ValueError(
            f"the tie convention {options.ties.name!r} averages over rankings, and the dataset does not say which pairs "
            "belong to one (group); choose another convention, such as 'half'"
        )
    tuning = options.tie_threshold is None and options.ties.tuned_threshold
    held = validation_half(table.clusters, options.seed) if tuning else np.zeros(len(table), dtype=bool)
    analysis = _Analysis(table, options, held)
    reports = tuple(analysis.report(scorer, pairs) for scorer, pairs in scored)
    return Comparison(
        dataset=dataset,
        ties=options.ties,
        pairs=len(table),
        prompts=len(set(table.clusters)),
        seed=options.seed,
        resamples=options.resamples,
        rewards=reports,
        differences=tuple(analysis.difference(report, reports[0]) for report in reports[1:]),
        notes=_notes(table, options, held),
    )


class _Analysis:
    """What all rewards and settings share: the pairs that are reported, their resamples and cells."""

    def __init__(self, table: PairTable, options: AnalysisOptions, held: np.ndarray) -> None:
        self.table, self.options, self.held, self.kept = table, options, held, torch.from_numpy(~held)

        def reported(values: Sequence[object]) -> list[object]:
            return [value for value, left_out in zip(values, held, strict=True) if not left_out]

        self.cells = CellAnalysis(
            {name: reported(values) for name, values in select_columns(options.by, table.columns).items()},
            reported(table.clusters),
            ties=options.ties,
            rankings=reported(table.groups) if options.ties.per_ranking else None,
            resamples=options.resamples,
            seed=options.seed,
            num_bins=options.num_bins,
        )
        self.resampled: dict[tuple[str, str], np.ndarray] = {}

    def report(self, scorer: Scorer, scored: ScoredPairs) -> ScorerReport:
        margins, labels = self.table.margins(scored.scores), self.table.labels
        probabilities = scorer.probabilities(margins)
        settings = {}
        for column, setting in enumerate(scorer.settings):
            predicted = None if probabilities is None else probabilities[:, column]
            threshold = self._threshold(margins[:, column], labels)
            accuracy, cells, self.resampled[scorer.name, setting.name] = self.cells.measure(
                margins[self.kept, column],
                labels[self.kept],
                threshold=threshold.value,
                probabilities=None if predicted is None else predicted[self.kept],
            )
            settings[setting.name] = SettingReport(
                setting=setting,
                accuracy=accuracy,
                threshold=threshold,
                calibration=None
                if predicted is None
                else measure_calibration(predicted, labels, num_bins=self.options.num_bins),
                distribution=describe_scores(scored.scores[:, column]),
                by=cells,
            )
        return ScorerReport(
            scorer.name, scorer.likelihood, settings, scored.cost, _fitted_variance(scorer, margins, labels)
        )

    def difference(self, report: ScorerReport, baseline: ScorerReport) -> Difference:
        """Headline settings on the same resamples."""
        one, other = ((each.name, each.headline) for each in (report, baseline))
        drawn = self.resampled[one] - self.resampled[other]
        low, high = self.cells.bootstrap.interval(drawn[:, None])[0]
        values = [each.settings[each.headline].accuracy.value for each in (report, baseline)]
        return Difference(one, other, values[0] - values[1], (float(low), float(high)))

    def _threshold(self, margins: Any, labels: Any) -> TieThreshold:
        if self.options.tie_threshold is not None:
            return TieThreshold(self.options.tie_threshold, "given")
        if not self.options.ties.tuned_threshold:
            return TieThreshold()
        value = tune_tie_threshold(margins[self.held], labels[self.held], self.options.ties)
        return TieThreshold(value, "tuned", int(self.held.sum()))


def _fitted_variance(scorer: Scorer, margins: Any, labels: Any) -> ThurstoneModel | None:
    levels = {
        setting.levels[0]: column
        for column, setting in enumerate(scorer.settings)
        if len(setting.levels) == 1 and setting.draws == 1
    }
    if scorer.likelihood != "thurstone" or len(levels) < 2:
        return None
    try:
        return fit_variance(margins[:, list(levels.values())], list(levels), labels)
    except ValueError:  # no variance fits best
        return None


def _notes(table: PairTable, options: AnalysisOptions, held: np.ndarray) -> tuple[str, ...]:
    notes = []
    if held.any():
        notes.append(
            f"accuracy is of {int((~held).sum())} pairs; the tie threshold was tuned on the {int(held.sum())} pairs of the "
            "other half of the prompts, for each reward and setting"
        )
    if options.ties.per_ranking and (incomplete := table.incomplete_rankings()):
        notes.append(f"{incomplete} rankings lack pairs; their share of inversions is over the pairs that are there")
    if len(set(table.clusters)) < 2:
        notes.append("all pairs are of one prompt, so there is no confidence interval")
    return tuple(notes)
