"""How good is a reward: accuracy by noise level and by column, calibration, which ensemble pays, cost, pictures.

Nothing here trains, and a scorer is any callable. Begin at `comparison.evaluate_scorers` for several rewards side by
side, at `report.evaluate_preferences` for one.
"""

from dina_reward.evaluation.accuracy import (
    BENCHMARK_TIES,
    TIE_CONVENTIONS,
    Accuracy,
    TieConvention,
    accuracy_by_noise,
    pairwise_accuracy,
)
from dina_reward.evaluation.benchmarks import BenchmarkRow, benchmark_rows, benchmark_table
from dina_reward.evaluation.calibration import Calibration, CalibrationBin, measure_calibration
from dina_reward.evaluation.cells import FEW_PAIRS, Cell
from dina_reward.evaluation.clip import ClipReward
from dina_reward.evaluation.comparison import Comparison, ScorerReport, SettingReport, evaluate_scorers
from dina_reward.evaluation.comparison_plots import plot_comparison
from dina_reward.evaluation.draw_scores import DrawMargins, score_draws
from dina_reward.evaluation.ensemble_advice import EnsembleAdvice, EnsembleGain, Gain, advise, ensemble_advice
from dina_reward.evaluation.margin_variance import MarginVariance, margin_variances
from dina_reward.evaluation.pair_scores import PairProtocol, PairScores, score_batch, score_pairs
from dina_reward.evaluation.plots import plot_evaluation
from dina_reward.evaluation.report import EvaluationReport, evaluate_preferences, report_from_scores
from dina_reward.evaluation.scored_pairs import ScoredPairs, score_dataset
from dina_reward.evaluation.scorers import CallableScorer, LatentScorer, Scorer
from dina_reward.evaluation.settings import Setting, evaluation_settings
from dina_reward.evaluation.spread import SpreadFit, calibrate_spread, fit_spread
from dina_reward.evaluation.tables import comparison_table
from dina_reward.evaluation.ties import tune_tie_threshold
from dina_reward.evaluation.variance import calibrate_variance, fit_variance


__all__ = [
    "BENCHMARK_TIES",
    "FEW_PAIRS",
    "TIE_CONVENTIONS",
    "Accuracy",
    "BenchmarkRow",
    "Calibration",
    "CalibrationBin",
    "CallableScorer",
    "Cell",
    "ClipReward",
    "Comparison",
    "DrawMargins",
    "EnsembleAdvice",
    "EnsembleGain",
    "EvaluationReport",
    "Gain",
    "LatentScorer",
    "MarginVariance",
    "PairProtocol",
    "PairScores",
    "ScoredPairs",
    "Scorer",
    "ScorerReport",
    "Setting",
    "SettingReport",
    "SpreadFit",
    "TieConvention",
    "accuracy_by_noise",
    "advise",
    "benchmark_rows",
    "benchmark_table",
    "calibrate_spread",
    "calibrate_variance",
    "comparison_table",
    "ensemble_advice",
    "evaluate_preferences",
    "evaluate_scorers",
    "evaluation_settings",
    "fit_spread",
    "fit_variance",
    "margin_variances",
    "measure_calibration",
    "pairwise_accuracy",
    "plot_comparison",
    "plot_evaluation",
    "report_from_scores",
    "score_batch",
    "score_dataset",
    "score_draws",
    "score_pairs",
    "tune_tie_threshold",
]
