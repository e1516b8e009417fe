"""What a run has spent: denoiser, reward, decoder and judge calls, seconds, over ranks and resumptions, and its budget."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from dina_reward.alignment.config import AlignmentConfig
from dina_reward.checks.stored import read_json
from dina_reward.training.checkpointing import CheckpointedCallback


@dataclass
class CallCounter:
    """Calls that training makes, in samples: the unit in which algorithms are compared at equal effort.

    One *denoiser call* is one forward pass of the policy, of an old policy or of the reference on one sample at one
    timestep. Classifier-free guidance runs two, so it counts two; a guidance scale that the model takes as an input counts
    one. Calls that record a graph are `update`; their backward passes, which cost about two forward passes each, are not
    counted besides. All others are `rollout`: sampling, and what old policies and references predict.

    One *reward call* is one state of one sample scored by all reward functions together, whatever their noise levels and
    draws. One *decoder call* is one sample decoded to pixels. One *judge call* is one sample, or one pair, that a judge is
    asked about to refresh the reward. Held-out evaluation counts nowhere.

    Args:
        rollout (`int`): denoiser calls without gradient, on this rank.
        update (`int`): denoiser calls with gradient.
        reward (`int`): reward calls.
        decoder (`int`): decoder calls.
        judge (`int`): judge calls.
    """

    rollout: int = 0
    update: int = 0
    reward: int = 0
    decoder: int = 0
    judge: int = 0

    def __post_init__(self) -> None:
        self._paused = False

    def count_denoiser(self, samples: int, evaluations: int = 1) -> None:
        """Adds denoiser calls, to those with gradient where gradients are recorded.

        Args:
            samples: rows of the batch.
            evaluations: of the denoiser per row; 2 with classifier-free guidance.
        """
        self._add("update" if torch.is_grad_enabled() else "rollout", samples * evaluations)

    def count_rewards(self, samples: int) -> None:
        """Adds reward calls."""
        self._add("reward", samples)

    def count_decodes(self, samples: int) -> None:
        """Adds decoder calls."""
        self._add("decoder", samples)

    def count_judgements(self, samples: int) -> None:
        """Adds judge calls."""
        self._add("judge", samples)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is counted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def reset(self) -> None:
        """Begins again at zero."""
        self.rollout = self.update = self.reward = self.decoder = self.judge = 0

    def _add(self, name: str, calls: int) -> None:
        if not self._paused:
            setattr(self, name, getattr(self, name) + calls)


@dataclass(frozen=True)
class RunCosts:
    """Costs of a run so far, over all its ranks and resumptions.

    Args:
        calls (`CallCounter`): calls of all ranks.
        seconds (`float`): wall-clock time of training, without held-out evaluation.
    """

    calls: CallCounter
    seconds: float

    @property
    def denoiser_calls(self) -> int:
        """All denoiser calls."""
        return self.calls.rollout + self.calls.update

    def as_metrics(self) -> dict[str, float]:
        """As they stand in log lines and in the evaluation history."""
        return {
            "denoiser_calls": self.denoiser_calls,
            "denoiser_calls/rollout": self.calls.rollout,
            "denoiser_calls/update": self.calls.update,
            "reward_calls": self.calls.reward,
            "decoder_calls": self.calls.decoder,
            "judge_calls": self.calls.judge,
            "train_seconds": self.seconds,
        }


class CostCallback(CheckpointedCallback):
    """Sums costs over ranks, carries them through checkpoints, and acts on marks and budgets of denoiser calls.

    With `eval_denoiser_calls` the run is evaluated whenever a further multiple of it has been made, with
    `max_denoiser_calls` it stops, evaluates and saves: both at the first end of a generation at or after the mark.

    Args:
        counter: what this rank counts.
        args: the configuration.
        accelerator: the `accelerate.Accelerator` of the run.
    """

    file_name = "costs.json"
    # The sum over ranks is collective.
    gathers = True

    def __init__(self, counter: CallCounter, args: AlignmentConfig, accelerator: Any) -> None:
        self.counter = counter
        self.args = args
        self.accelerator = accelerator
        self._earlier = RunCosts(CallCounter(), 0.0)
        self._seconds = 0.0
        self._running_since: float | None = None
        self._next_mark: int | None = None

    def costs(self) -> RunCosts:
        """Costs of the run so far; to be called on all ranks together."""
        names = [field.name for field in fields(CallCounter)]
        here = torch.tensor([getattr(self.counter, name) for name in names], device=self.accelerator.device)
        summed = self.accelerator.reduce(here, reduction="sum").tolist()
        total = [getattr(self._earlier.calls, name) + count for name, count in zip(names, summed, strict=True)]
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return RunCosts(CallCounter(*total), self._earlier.seconds + self._seconds + running)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context of work that is not part of training: neither calls nor seconds count."""
        running = self._running_since is not None
        self._stop_clock()
        try:
            with self.counter.paused():
                yield
        finally:
            if running:
                self._running_since = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._running_since = time.perf_counter()
        every = self.args.eval_denoiser_calls
        self._next_mark = None if every is None else (self.costs().denoiser_calls // every + 1) * every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the end of a generation, evaluates at a mark and stops where the budget is spent."""
        every, most = self.args.eval_denoiser_calls, self.args.max_denoiser_calls
        unfinished = state.global_step * self.args.gradient_accumulation_steps % self.args.micro_steps_per_generation
        if unfinished or (every is None and most is None):
            return
        calls = self.costs().denoiser_calls
        spent = most is not None and calls >= most
        if spent:
            control.should_training_stop = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
        if every is not None and self._next_mark is not None and (spent or calls >= self._next_mark):
            control.should_evaluate = True
            self._next_mark = (calls // every + 1) * every

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock."""
        self._stop_clock()

    def save_state(self, directory: str) -> None:
        """Writes ``costs.json``."""
        costs = self.costs()
        if self.args.should_save:
            text = json.dumps({"calls": asdict(costs.calls), "seconds": costs.seconds}, indent=2)
            Path(directory, self.file_name).write_text(text + "\n", encoding="utf-8")

    def load_state(self, directory: str) -> None:
        """Goes on from ``costs.json`` in place of what was counted here.

        Raises:
            ValueError: the file is missing.
        """
        path = Path(directory, self.file_name)
        if not path.is_file():
            raise ValueError(f"{directory} holds no {self.file_name}, so it is no checkpoint of an alignment trainer")
        self.counter.reset()
        self._seconds = 0.0
        stored = read_json(path)
        self._earlier = RunCosts(CallCounter(**stored["calls"]), stored["seconds"])

    def _stop_clock(self) -> None:
        if self._running_since is not None:
            self._seconds += time.perf_counter() - self._running_since
            self._running_since = None
