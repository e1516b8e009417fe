"""Alarm for reward hacking: the training reward rises while a held-out judge falls beyond its noise."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.checks.stored import parse_json


logger = logging.get_logger(__name__)

SCORES_NAME = "evaluation_scores.jsonl"
REWARD = "reward"
"""Name of what training maximises among the scores of an evaluation."""
REWARD_PREFIX = "rewards/"
"""Start of the names of its parts; all other scores are those of held-out judges."""

_FLOAT32_EPS = torch.finfo(torch.float32).eps
_MIN_PROMPTS = 3

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class PromptScores:
    """Scores of one evaluation, prompt by prompt: what makes two evaluations comparable beyond their means.

    Args:
        step (`int`): optimizer steps made.
        scores (`dict[str, list[float | None]]`): for every metric one score per held-out prompt; None if not applicable.
        protocol (`str`): digest of prompts, noise seed and sampling settings; evaluations with another are not compared.
    """

    step: int
    scores: dict[str, list[float | None]]
    protocol: str = ""


@dataclass(frozen=True)
class RewardHacking:
    """One alarm: what changed from the judge's best evaluation in the window to the latest.

    Args:
        step (`int`): of the latest evaluation.
        since_step (`int`): of the one it is compared with.
        judge (`str`): name of the judge that fell.
        reward_before, reward_after (`float`): mean training reward of both.
        judge_before, judge_after (`float`): mean of the judge.
        standard_error (`float`): of the judge's mean change, over paired prompts.
        num_prompts (`int`): prompts that both evaluations have a score for.
    """

    step: int
    since_step: int
    judge: str
    reward_before: float
    reward_after: float
    judge_before: float
    judge_after: float
    standard_error: float
    num_prompts: int

    @property
    def message(self) -> str:
        """What happened and what to do."""
        return (
            f"Reward hacking? Since step {self.since_step} the reward rose from {self.reward_before:.4g} to "
            f"{self.reward_after:.4g} while held-out {self.judge} fell from {self.judge_before:.4g} to "
            f"{self.judge_after:.4g}, with a standard error of {self.standard_error:.2g} over {self.num_prompts} prompts "
            f"(step {self.step}). Stop here, lower the learning rate or raise beta."
        )


def find_reward_hacking(
    history: Sequence[PromptScores], *, window: int = 3, threshold: float = 2.0
) -> list[RewardHacking]:
    """Compares the latest evaluation, judge by judge, with the judge's best one among the ``window`` before it.

    Evaluations use the same prompts and noise, so the differences ``d`` of single prompts are at hand. An alarm needs a
    higher mean reward and ``mean(d) < -t std(d) / sqrt(prompts)``. ``t`` is ``threshold`` standard errors, raised so that
    neither the choice of the best of several evaluations (Bonferroni) nor a small number of prompts (Student) makes
    false alarms more likely than the normal tail ``1 - Phi(threshold)``: 2.3 % per judge and evaluation by default.

    Args:
        history: evaluations in the order of their steps, the latest at the end.
        window: evaluations before the latest to look back on; fewer will do.
        threshold: in standard errors.

    Returns:
        One alarm per judge that fell.
    """
    if not history:
        return []
    latest = history[-1]
    earlier = [record for record in history[:-1] if record.protocol == latest.protocol][-window:]
    judges = [name for name in latest.scores if name != REWARD and not name.startswith(REWARD_PREFIX)]
    alarms = (_compare(earlier, latest, judge, threshold) for judge in judges)
    return [alarm for alarm in alarms if alarm is not None]


def _compare(
    earlier: Sequence[PromptScores], latest: PromptScores, judge: str, threshold: float
) -> RewardHacking | None:
    comparable = [
        record
        for record in earlier
        if all(len(record.scores.get(name, ())) == len(latest.scores.get(name, ())) > 0 for name in (judge, REWARD))
    ]
    if not comparable:
        return None
    best = max(comparable, key=lambda record: float(_values(record, judge).nanmean().nan_to_num(-math.inf)))
    change, rise = _change(best, latest, judge), _change(best, latest, REWARD)
    count = len(change)
    if count < _MIN_PROMPTS or len(rise) == 0 or float(rise.mean()) <= 0:
        return None
    standard_error = float(change.std()) / math.sqrt(count)
    # Where all prompts fall alike the error is 0; rounding is no fall.
    rounding = _FLOAT32_EPS * float(_values(best, judge).abs().nan_to_num(0.0).max())
    if -float(change.mean()) <= max(_critical(threshold, len(comparable), count) * standard_error, rounding):
        return None
    return RewardHacking(
        step=latest.step,
        since_step=best.step,
        judge=judge,
        reward_before=float(_values(best, REWARD).nanmean()),
        reward_after=float(_values(latest, REWARD).nanmean()),
        judge_before=float(_values(best, judge).nanmean()),
        judge_after=float(_values(latest, judge).nanmean()),
        standard_error=standard_error,
        num_prompts=count,
    )


def _values(record: PromptScores, name: str) -> Tensor:
    values = [math.nan if value is None else value for value in record.scores[name]]
    return torch.tensor(values, dtype=torch.float64)


def _change(before: PromptScores, after: PromptScores, name: str) -> Tensor:
    difference = _values(after, name) - _values(before, name)
    return difference[~torch.isnan(difference)]


def _critical(threshold: float, comparisons: int, count: int) -> float:
    """Standard errors that a mean of ``count`` values must exceed; Cornish-Fisher expansion of Student's quantile."""
    tail = NormalDist().cdf(-threshold) / comparisons
    z = -NormalDist().inv_cdf(tail) if tail > 0 else threshold
    freedom = count - 1
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


class RewardHackingCallback(TrainerCallback):
    """Watches held-out evaluations and warns, or stops the run, when the reward is being hacked.

    `HeldOutEvaluator` asks it after every evaluation (see `find_reward_hacking` for the test), writes the alarms into the
    history and reports ``hacking_alarm`` (0 or 1). The window survives a resume: scores are kept in
    ``evaluation_scores.jsonl``.

    Args:
        window: evaluations before the latest to look back on.
        threshold: standard errors that a judge must have fallen by.
        stop: end training at an alarm.
        on_reward_hacking: called with each `RewardHacking`, on the main process.
    """

    def __init__(
        self,
        window: int = 3,
        threshold: float = 2.0,
        stop: bool = False,
        on_reward_hacking: Callable[[RewardHacking], Any] | None = None,
    ) -> None:
        if window < 1 or not threshold > 0:
            raise ValueError(f"window {window} must be at least 1 and threshold {threshold} above 0")
        self.window = window
        self.threshold = threshold
        self.stop = stop
        self.on_reward_hacking = on_reward_hacking
        self.alarms: list[RewardHacking] = []

    def find(self, history: Sequence[PromptScores]) -> list[RewardHacking]:
        """`find_reward_hacking` with the settings of this callback."""
        return find_reward_hacking(history, window=self.window, threshold=self.threshold)

    def report(self, alarms: Sequence[RewardHacking], *, is_main_process: bool = True) -> None:
        """Takes note of the alarms of the latest evaluation, on every rank; the main process warns and calls the hook."""
        self.alarms = list(alarms)
        for alarm in self.alarms if is_main_process else ():
            logger.warning(alarm.message)
            if self.on_reward_hacking is not None:
                self.on_reward_hacking(alarm)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stops the run if the latest evaluation gave an alarm and ``stop`` is set."""
        if self.stop and self.alarms:
            control.should_training_stop = True
        return control


def read_lines(path: str | os.PathLike[str], record_type: type[_Record]) -> list[_Record]:
    """Records (dataclasses) of a JSON-lines file in order; empty if there is none."""
    file = Path(path)
    if not file.exists():
        return []
    return [record_type(**parse_json(line, file)) for line in file.read_text(encoding="utf-8").splitlines() if line]


def append_line(path: str | os.PathLike[str], record: _Record) -> list[_Record]:
    """Adds a record with a ``step``; those of the same or later steps, left by a run that was resumed, are replaced.

    Returns:
        All records.
    """
    file = Path(path)
    step = record.step  # type: ignore[attr-defined]
    records = [old for old in read_lines(file, type(record)) if old.step < step] + [record]  # type: ignore[attr-defined]
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as staging:
        staging.write_text("".join(json.dumps(asdict(line)) + "\n" for line in records), encoding="utf-8")  # type: ignore[call-overload]
    return records
