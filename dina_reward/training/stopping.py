"""Runs that are told to stop: SIGTERM (Slurm, Kubernetes) saves and ends, Ctrl-C says how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)


class StopOnSignal(TrainerCallback):
    """After SIGTERM, training saves and stops at the next step that can be resumed from; a second one ends it at once.

    Args:
        accelerator: by which all ranks stop at the same step, whichever of them was told.
        can_save: whether a run may be resumed from a step.
    """

    def __init__(self, accelerator: Accelerator, can_save: Callable[[int], bool]) -> None:
        self.accelerator = accelerator
        self.can_save = can_save
        self.told = False
        self.stopped = False
        self._before: Any = None

    def __enter__(self) -> StopOnSignal:
        self.told = self.stopped = False
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def _tell(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        self._restore()
        logger.warning("SIGTERM: saving at the next step that can be resumed from, then ending.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves and stops if any rank was told to."""
        told = self.told
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.gather(torch.tensor([told], device=self.accelerator.device))
            told = bool(flags.any())
        if told and self.can_save(state.global_step):
            self.stopped = True
            control.should_save = control.should_training_stop = True
