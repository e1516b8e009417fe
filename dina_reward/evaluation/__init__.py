"""How good is a latent reward: pairwise accuracy by noise level, tie conventions, calibration, pictures."""

from dina_reward.evaluation.accuracy import (
    TIE_CONVENTIONS,
    Accuracy,
    TieConvention,
    accuracy_by_noise,
    pairwise_accuracy,
)
from dina_reward.evaluation.calibration import Calibration, CalibrationBin, measure_calibration
from dina_reward.evaluation.pair_scores import PairProtocol, PairScores, score_batch, score_pairs
from dina_reward.evaluation.plots import plot_evaluation
from dina_reward.evaluation.report import EvaluationReport, evaluate_preferences, report_from_scores


__all__ = [
    "TIE_CONVENTIONS",
    "Accuracy",
    "Calibration",
    "CalibrationBin",
    "EvaluationReport",
    "PairProtocol",
    "PairScores",
    "TieConvention",
    "accuracy_by_noise",
    "evaluate_preferences",
    "measure_calibration",
    "pairwise_accuracy",
    "plot_evaluation",
    "report_from_scores",
    "score_batch",
    "score_pairs",
]
