"""Which ensemble pays for a reward on given pairs: several noise draws, several levels, or none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dina_reward.data.preference import Preference
from dina_reward.evaluation.accuracy import TieConvention, pair_credit
from dina_reward.evaluation.bootstrap import ClusterBootstrap
from dina_reward.evaluation.calibration import pair_nll
from dina_reward.evaluation.draw_scores import DrawMargins, Levels, score_draws
from dina_reward.evaluation.margin_variance import MarginVariance, margin_variances
from dina_reward.evaluation.markdown import markdown, plain
from dina_reward.likelihood import ensemble_level


if TYPE_CHECKING:
    from dina_reward.reward import LatentReward


_RESAMPLES = 800
"""At least so many for each ensemble, so that twenty lie beyond either bound of a simultaneous interval."""


@dataclass(frozen=True)
class Gain:
    """What an ensemble adds to the best single level.

    Args:
        measured: on the pairs; positive is better.
        interval: of ``measured``, by resampling prompts, simultaneous over all ensembles.
        predicted: from the variances; ``None`` where there is no formula.
    """

    measured: float
    interval: tuple[float, float]
    predicted: float | None = None

    @property
    def pays(self) -> bool:
        """Whether the interval lies above zero."""
        return self.interval[0] > 0

    @property
    def costs(self) -> bool:
        """Whether the interval lies below zero."""
        return self.interval[1] < 0


@dataclass(frozen=True)
class EnsembleGain:
    """One ensemble.

    Args:
        name: for tables: ``"4 draws at 0.4"``, ``"levels (0.2, 0.5), tokens, own noise"``.
        passes: levels times draws: how often the backbone reads a latent.
        accuracy: gain in pairwise accuracy, in ``[-1, 1]``.
        nll: gain in negative log-likelihood, in nats.
    """

    name: str
    passes: int
    accuracy: Gain
    nll: Gain


@dataclass(frozen=True)
class EnsembleAdvice:
    """What ensembles bring.

    Args:
        pairs, prompts: counts; prompts are what is resampled.
        draws: noise draws that everything is measured with.
        accuracy, nll: of each single level with one draw, mean over draws.
        best_level, best_nll_level: single levels of the highest accuracy and of the least NLL, which gains are relative to.
        variances: of the margins, by level.
        ensembles: what was tried.
        recommended: the ensemble of the largest gain in accuracy among those whose interval excludes zero.
        recommended_for_probabilities: likewise for the NLL, among those that do not cost accuracy.
        recommendation: what follows, in one sentence.
    """

    pairs: int
    prompts: int
    draws: int
    accuracy: dict[float, float]
    nll: dict[float, float]
    best_level: float
    best_nll_level: float
    variances: tuple[MarginVariance, ...]
    ensembles: tuple[EnsembleGain, ...]
    recommended: EnsembleGain | None
    recommended_for_probabilities: EnsembleGain | None
    recommendation: str

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for JSON."""
        return plain(asdict(self))

    def table(self) -> str:
        """Markdown: share of noise by level, gains, recommendation."""
        by_level = [
            [
                f"{part.noise_level:g}",
                f"{100 * self.accuracy[part.noise_level]:.2f}",
                f"{self.nll[part.noise_level]:.4f}",
                *(f"{value:.4g}" for value in (part.between, part.noise)),
                f"{100 * part.noise_share:.1f} %",
            ]
            for part in self.variances
        ]
        gains = [
            [
                *(found.name, f"{found.passes}", _signed(found.accuracy, 100), _predicted(found.accuracy, 100)),
                *(_signed(found.nll), _predicted(found.nll)),
            ]
            for found in self.ensembles
        ]
        columns = ("noise level", "accuracy %", "NLL", "variance between pairs", "of noise", "share that is noise")
        return "\n\n".join(
            [
                f"Share of margin variance that is noise, by level ({self.draws} draws, {self.pairs:,} pairs):",
                markdown(columns, by_level),
                f"Gain over the best single level (accuracy: {self.best_level:g}, NLL: {self.best_nll_level:g}; one draw):",
                markdown(("ensemble", "passes", "accuracy, points", "predicted", "NLL lower by", "predicted"), gains),
                f"Intervals hold for all {len(self.ensembles)} ensembles at once (95 %, Bonferroni). "
                f"Recommendation: {self.recommendation}.",
            ]
        )


def ensemble_advice(
    reward: LatentReward,
    pairs: Iterable[Preference | Mapping[str, Any]],
    *,
    noise_levels: Sequence[float] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    ensembles: Sequence[Sequence[float]] = ((0.2, 0.5, 0.7),),
    draws: int = 4,
    pipeline: Any | None = None,
    ties: str | TieConvention = "half",
    resamples: int = 1000,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> EnsembleAdvice:
    """Says whether, and which, ensemble pays for this reward on these pairs.

    Everything is scored under several independent noise draws. Tried are 2, 4, ... draws at the best single level, and every
    ensemble of levels: averaged and over tokens, with noise that the levels share and with noise of their own.

    Example:
        >>> advice = ensemble_advice(reward, load_preferences("preferences"))
        >>> print(advice.table())
        >>> text = advice.recommendation  # such as "no ensemble pays: single level 0.4"

    Args:
        reward: the reward.
        pairs: `Preference` records, or rows of training data.
        noise_levels: single levels.
        ensembles: levels of each ensemble.
        draws: noise draws, at least two, and at least as many as an ensemble has levels.
        pipeline: diffusers pipeline that encodes images.
        ties: tie convention; every pair counts alike, and only equal scores are predicted ties.
        resamples: of the bootstrap over prompts, at least; simultaneous intervals take 800 for each ensemble.
        batch_size: samples per pass; does not change results.
        seed: of noise and resampling.
        progress: show a progress bar.

    Raises:
        ValueError: too few draws, no pairs, or a record that cannot be used.
    """
    groups = [tuple(levels) for levels in ensembles]
    levels = sorted({*noise_levels, *(level for group in groups for level in group)})
    margins = score_draws(
        reward,
        pairs,
        levels,
        ensembles=groups,
        draws=draws,
        pipeline=pipeline,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return advise(margins, groups, ties=ties, resamples=resamples, seed=seed)


def advise(
    margins: DrawMargins,
    ensembles: Sequence[Levels] = (),
    *,
    ties: str | TieConvention = "half",
    resamples: int = 1000,
    seed: int = 0,
) -> EnsembleAdvice:
    """Advice from margins that are there already; arguments as for `ensemble_advice`."""
    judge = _Judge(margins, TieConvention.named(ties))
    levels = margins.noise_levels
    accuracy = {level: float(np.nanmean(judge.credit(margins.at(level)))) for level in levels}
    nll = {level: float(judge.nll(margins.at(level), (level,)).mean()) for level in levels}
    best = max(levels, key=lambda level: (accuracy[level], -nll[level]))
    best_nll = min(levels, key=nll.__getitem__)
    variances = {part.noise_level: part for part in margin_variances(margins.margins, levels)}
    tried = [*_of_draws(judge, dict.fromkeys((best, best_nll)), variances), *_of_levels(judge, ensembles, variances)]
    credit = np.stack([judge.credit(each.margins) - judge.credit(margins.at(best)) for each in tried], axis=1)
    gained = np.stack(
        [judge.nll(margins.at(best_nll), (best_nll,)) - judge.nll(each.margins, each.levels) for each in tried], axis=1
    )
    bootstrap = ClusterBootstrap(margins.clusters, resamples=max(resamples, _RESAMPLES * len(tried)), seed=seed)
    drawn = bootstrap.means(np.concatenate([credit, gained], axis=1))
    bounds = bootstrap.interval(drawn, 1 - 0.05 / len(tried)).reshape(2, len(tried), 2)
    found = tuple(
        EnsembleGain(
            each.name,
            each.passes,
            Gain(
                float(np.nanmean(credit[:, place])),
                _two(bounds[0][place]),
                _minus(judge.predicted_accuracy(each, best, variances[best]), accuracy[best]),
            ),
            Gain(
                float(gained[:, place].mean()),
                _two(bounds[1][place]),
                None if each.nll is None else nll[best_nll] - each.nll,
            ),
        )
        for place, each in enumerate(tried)
    )
    recommended = _best([each for each in found if each.accuracy.pays], "accuracy")
    for_probabilities = _best([each for each in found if each.nll.pays and not each.accuracy.costs], "nll")
    return EnsembleAdvice(
        pairs=len(margins.labels),
        prompts=bootstrap.num_clusters,
        draws=margins.draws,
        accuracy=accuracy,
        nll=nll,
        best_level=best,
        best_nll_level=best_nll,
        variances=tuple(variances.values()),
        ensembles=found,
        recommended=recommended,
        recommended_for_probabilities=for_probabilities,
        recommendation=_sentence(recommended, for_probabilities, best, best_nll),
    )


def _sentence(accurate: EnsembleGain | None, probable: EnsembleGain | None, best: float, best_nll: float) -> str:
    if accurate is not None:
        return (
            f"{accurate.name}: {_signed(accurate.accuracy, 100)} points of accuracy over the single level {best:g}, for "
            f"{accurate.passes} passes instead of one"
        )
    if probable is not None:
        return (
            f"no ensemble pays in accuracy: single level {best:g}; where probabilities matter, {probable.name}: NLL better "
            f"by {_signed(probable.nll)} than at the single level {best_nll:g}"
        )
    return f"no ensemble pays: single level {best:g}"


@dataclass(frozen=True)
class _Tried:
    """An ensemble with its margins ``(pairs, repetitions)``, the predicted ``mean(m^2)``, and the predicted NLL."""

    name: str
    passes: int
    levels: Levels
    margins: Tensor
    total: float | None = None
    nll: float | None = None


class _Judge:
    """Credit and NLL of each pair, averaged over repetitions, and what theory predicts."""

    def __init__(self, margins: DrawMargins, ties: TieConvention) -> None:
        self.margins, self.ties = margins, ties

    def credit(self, margins: Tensor) -> np.ndarray:
        """Accuracy of each pair, shape ``(pairs,)``; NaN where it does not count."""
        columns = [pair_credit(column, self.margins.labels, self.ties) for column in margins.T]
        return torch.stack(columns).mean(dim=0).numpy()

    def nll(self, margins: Tensor, levels: Levels) -> np.ndarray:
        """NLL of each pair under the reward's likelihood, shape ``(pairs,)``."""
        level, model = ensemble_level(torch.tensor(levels)), self.margins.preference_model
        probabilities = [model.probability(column, torch.zeros_like(column), level) for column in margins.T]
        return torch.stack([pair_nll(each, self.margins.labels) for each in probabilities]).mean(dim=0).numpy()

    def predicted_accuracy(self, tried: _Tried, best: float, variance: MarginVariance) -> float | None:
        """``1/2 + arcsin(rho) / pi`` (Sheppard 1899): how often two normal variables of correlation ``rho`` agree in sign.

        ``rho`` of the best single level follows from its accuracy; that of the ensemble is larger as its margins' covariance
        with the labels, over their deviation, is.
        """
        if tried.total is None:
            return None
        sides = (self.margins.labels - 0.5).sign()[:, None]
        single = self.margins.at(best).double()
        covariances = [float((sides * values.double()).mean()) for values in (tried.margins, single)]
        deviations = [math.sqrt(tried.total), math.sqrt(variance.between + variance.noise)]
        if not covariances[1] > 0 or not min(deviations) > 0:
            return None
        accuracy = float(np.nanmean(self.credit(single)))
        rho = (
            math.sin(math.pi * (accuracy - 0.5)) * (covariances[0] / deviations[0]) / (covariances[1] / deviations[1])
        )
        return 0.5 + math.asin(min(max(rho, -1.0), 1.0)) / math.pi

    def predicted_nll(self, level: float, count: int, noise: float) -> float:
        """NLL of averages of ``count`` draws, to second order: less than that of one draw by half the curvature times the
        variance that the average takes away, which two more draws that far from the margin would add.
        """
        single, step = self.margins.at(level).double(), math.sqrt(noise * (1 - 1 / count))
        now, spread = (
            self.nll(values, (level,)).mean() for values in (single, torch.cat([single - step, single + step], 1))
        )
        return float(2 * now - spread)


def _of_draws(judge: _Judge, levels: Iterable[float], variances: Mapping[float, MarginVariance]) -> list[_Tried]:
    """Two, four, ... draws and all of them, at each of the levels."""
    total = judge.margins.draws
    counts = sorted({2**power for power in range(1, total.bit_length()) if 2**power <= total} | {total})
    return [
        _Tried(
            name=f"{count} draws at {level:g}",
            passes=count,
            levels=(level,),
            margins=judge.margins.of_draws(level, count),
            total=variances[level].between + variances[level].noise / count,
            nll=judge.predicted_nll(level, count, variances[level].noise),
        )
        for level in levels
        for count in counts
    ]


def _of_levels(judge: _Judge, ensembles: Sequence[Levels], variances: Mapping[float, MarginVariance]) -> list[_Tried]:
    """Averages and token ensembles, with noise that levels share and with noise of their own."""
    result = []
    for levels in ensembles:
        shown, count = ", ".join(f"{level:g}" for level in levels), len(levels)
        shared = judge.margins.of_levels(levels, shared=True)
        (whole,) = margin_variances(shared[:, None], (0.0,))
        own_noise = sum(variances[level].noise for level in levels) / count**2
        totals = {True: whole.between + whole.noise, False: whole.between + own_noise}
        for is_shared, what in ((True, "shared noise"), (False, "own noise")):
            averages = judge.margins.of_levels(levels, shared=is_shared)
            name = f"levels ({shown}), mean, {what}"
            result.append(_Tried(name, count, levels, averages, totals[is_shared]))
            if (tokens := judge.margins.tokens.get((levels, is_shared))) is not None:
                result.append(_Tried(f"levels ({shown}), tokens, {what}", count, levels, tokens))
    return result


def _best(candidates: Sequence[EnsembleGain], metric: str) -> EnsembleGain | None:
    """Of the largest gain, the cheaper one of two that are equal."""
    return max(candidates, key=lambda each: (getattr(each, metric).measured, -each.passes), default=None)


def _minus(value: float | None, base: float) -> float | None:
    return None if value is None else value - base


def _two(bounds: np.ndarray) -> tuple[float, float]:
    return float(bounds[0]), float(bounds[1])


def _signed(gain: Gain, factor: float = 1) -> str:
    digits = 2 if factor > 1 else 4
    low, high = (f"{factor * bound:+.{digits}f}" for bound in gain.interval)
    return f"{factor * gain.measured:+.{digits}f} [{low}, {high}]"


def _predicted(gain: Gain, factor: float = 1) -> str:
    return "-" if gain.predicted is None else f"{factor * gain.predicted:+.{2 if factor > 1 else 4}f}"
