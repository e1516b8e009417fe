"""Early stopping by audit: the policy that a held-out judge likes best is kept, and a run that gets no better ends."""

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

BEST_FOLDER = "best"


class BestPolicyCallback(AttachedCallback):
    """Keeps the weights of the evaluation with the highest mean score of a judge in ``OUTPUT_DIR/best``.

    A reward rises long after the pictures have begun to get worse; a judge of held-out prompts sees that. What is kept are
    the weights that were evaluated, those of the moving average if there is one. With ``restore``, the policy has them at
    the end of training, so that the run ends with its best policy and not with its last.

    Examples:
        >>> keep = BestPolicyCallback("pickscore", patience=3)
        >>> callbacks = [keep]  # of any alignment trainer with held-out prompts that pickscore judges

    Args:
        judge: name of a score of the held-out evaluation: of a judge, or one of the scores that it returns.
        patience: evaluations without a better one after which training stops; None: never.
        min_delta: by how much the score has to be higher to count as better.
        restore: load the best weights into the policy when training ends.
    """

    file_name = "best_policy.json"

    def __init__(
        self, judge: str, patience: int | None = None, min_delta: float = 0.0, *, restore: bool = True
    ) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1 evaluation, or None, got {patience}")
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(f"min_delta must be finite and not negative, got {min_delta}")
        self.judge, self.patience, self.min_delta, self.restore = judge, patience, min_delta, restore
        self.best_step: int | None = None
        self.best_score = -math.inf
        self.since_best = 0
        self._trainer: Any = None

    @property
    def directory(self) -> Path:
        """Where the best weights are."""
        return Path(self._trainer.args.output_dir) / BEST_FOLDER

    def attach(self, trainer: Any) -> None:
        """Takes the trainer.

        Raises:
            ValueError: it has no held-out prompts, or evaluates nobody's judgement.
        """
        if trainer.eval_dataset is None or not trainer.evaluator.judges:
            raise ValueError(
                f"the policy that {self.judge!r} likes best can only be kept where held-out prompts are judged; give the "
                "trainer an eval_dataset and eval_reward_funcs"
            )
        self._trainer = trainer

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the weights if they are the best so far; stops the run after too many evaluations without.

        Raises:
            ValueError: the evaluation has no such score.
        """
        values = metrics or {}
        score = values.get(f"eval_{self.judge}", values.get(f"eval_{self.judge.lower()}"))
        if score is None:
            known = sorted(name.removeprefix("eval_") for name in values)
            raise ValueError(f"the evaluation has no score of a judge {self.judge!r}; it has {', '.join(known)}")
        if score > self.best_score + self.min_delta or self.best_step is None:
            self.best_step, self.best_score, self.since_best = state.global_step, score, 0
            trainer = self._trainer
            # Sharded weights are gathered by all ranks, so all of them come here.
            with trainer.averaged_policy():
                trainer.policy.save_weights(str(self.directory), write=trainer.args.should_save)
            trainer.accelerator.wait_for_everyone()
            return
        self.since_best += 1
        if self.patience is not None and self.since_best >= self.patience:
            logger.warning(
                f"Stopped at step {state.global_step}: {self.judge} was highest at step {self.best_step}, with "
                f"{self.best_score:.4g}, {self.since_best} evaluations ago."
            )
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the policy its best weights."""
        if self.restore and self.best_step is not None and self.directory.is_dir():
            self._trainer.policy.load_weights(str(self.directory))
            if self._trainer.ema is not None:
                self._trainer.ema.restart()
            logger.warning(
                f"The policy has the weights of step {self.best_step}, best by {self.judge} with {self.best_score:.4g}."
            )

    def save_state(self, directory: str) -> None:
        """Writes which evaluation was the best."""
        score = None if self.best_step is None else self.best_score
        state = {"judge": self.judge, "step": self.best_step, "score": score, "since": self.since_best}
        Path(directory, self.file_name).write_text(json.dumps(state) + "\n", encoding="utf-8")

    def load_state(self, directory: str) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: it is of a run that kept no best policy, or by another judge.
        """
        path = Path(directory, self.file_name)
        state = read_json(path) if path.is_file() else {}
        if state.get("judge") != self.judge:
            found = f"that of {state['judge']!r}" if state else "none"
            raise ValueError(
                f"{directory} has no best policy by {self.judge!r}, but {found}; resume it with its settings"
            )
        self.best_step, self.since_best = state["step"], int(state["since"])
        self.best_score = -math.inf if state["score"] is None else float(state["score"])
