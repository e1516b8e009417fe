"""The answer to an alarm: the policy is held closer to where it came from, until the judges have recovered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from dina_reward.alignment.monitoring.attached import AttachedCallback
from dina_reward.checks.stored import read_json


logger = logging.get_logger(__name__)


class TightenOnAlarm(AttachedCallback):
    """Multiplies the KL weight of a run, and divides its clip range, when the reward-hacking alarm goes off.

    Every evaluation with an alarm raises `AlignmentTrainer.tightness` by a factor, up to a limit; so many evaluations in a
    row without one lower it by the same factor, never below 1, where everything is as configured. While above 1 it is in
    the training log lines as ``tightness``, and it survives a resume.

    Examples:
        >>> callbacks = [TightenOnAlarm(factor=2.0, calm=2)]  # or hacking_tighten=2.0 in the configuration

    Args:
        factor: of one step, above 1.
        limit: the highest tightness, at least ``factor``.
        calm: evaluations in a row without an alarm after which it is lowered by a step; None: never.
    """

    file_name = "tightness.json"

    def __init__(self, factor: float = 2.0, limit: float = 16.0, calm: int | None = 2) -> None:
        if not (math.isfinite(factor) and factor > 1):
            raise ValueError(f"factor must be finite and above 1, got {factor}")
        if not (math.isfinite(limit) and limit >= factor):
            raise ValueError(f"limit must be finite and at least the factor {factor}, got {limit}")
        if calm is not None and calm < 1:
            raise ValueError(f"calm must be at least 1 evaluation, or None, got {calm}")
        self.factor, self.limit, self.calm = factor, limit, calm
        self.quiet = 0
        self._trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Takes the trainer.

        Raises:
            ValueError: its loss has neither a KL penalty nor a clip range, or no evaluation could raise an alarm.
        """
        if not trainer.can_tighten:
            raise ValueError(
                f"{type(trainer).__name__} has nothing to tighten with these settings: neither a KL penalty nor a clip "
                "range; set beta (beta_kl of DiffusionNFT) above 0"
            )
        if trainer.eval_dataset is None or not trainer.evaluator.judges:
            raise ValueError(
                "the reward-hacking alarm, and so what answers it, needs held-out prompts that are judged; give the "
                "trainer an eval_dataset and eval_reward_funcs"
            )
        self._trainer = trainer

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tightens after an alarm; loosens by a step after enough evaluations without."""
        trainer = self._trainer
        before = trainer.tightness
        if trainer.hacking.alarms:
            self.quiet = 0
            trainer.tightness = min(before * self.factor, self.limit)
        else:
            self.quiet += 1
            if self.quiet == self.calm:
                self.quiet = 0
                trainer.tightness = max(before / self.factor, 1.0)
        if trainer.tightness != before:
            logger.warning(
                f"Step {state.global_step}: KL weights are {trainer.tightness:.3g} times as high as configured, and clip "
                "ranges as many times smaller."
            )

    def save_state(self, directory: str) -> None:
        """Writes the tightness."""
        state = {"tightness": self._trainer.tightness, "quiet": self.quiet}
        Path(directory, self.file_name).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load_state(self, directory: str) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: it is of a run that answered no alarms.
        """
        path = Path(directory, self.file_name)
        if not path.is_file():
            raise ValueError(f"{directory} is of a run without TightenOnAlarm; resume it with its settings")
        state = read_json(path)
        self._trainer.tightness, self.quiet = float(state["tightness"]), int(state["quiet"])
