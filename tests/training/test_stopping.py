"""SIGTERM saves and ends; the next start goes on to the same weights."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from dina_reward.training.ownership import last_checkpoint
from tests.training.toy import ToyTrainer, toy_trainer


class TerminatedAt(TrainerCallback):
    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


class InPairs(ToyTrainer):
    def can_save_at(self, step: int) -> bool:
        return step % 4 == 0


@pytest.mark.parametrize(("trainer_class", "stopped_at"), [(ToyTrainer, 3), (InPairs, 4)])
@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_sigterm_saves_and_the_next_start_goes_on(
    tmp_path: Path, trainer_class: type[ToyTrainer], stopped_at: int, save_strategy: str
) -> None:
    whole = toy_trainer(tmp_path / "whole", trainer_class)
    whole.train()
    handler = signal.getsignal(signal.SIGTERM)
    stopped = toy_trainer(
        tmp_path / "stopped", trainer_class, callbacks=[TerminatedAt(2)], save_strategy=save_strategy, save_steps=100
    )
    with pytest.raises(SystemExit) as exit_code:
        stopped.train()
    assert exit_code.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert last_checkpoint(tmp_path / "stopped") == tmp_path / "stopped" / f"checkpoint-{stopped_at}"
    resumed = toy_trainer(tmp_path / "stopped", trainer_class)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Shells start background jobs with SIGINT ignored, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_an_interrupt_says_how_to_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step, message in (
        (1, "there is no checkpoint yet"),
        (3, "go on from .*checkpoint-2 with resume_from_checkpoint"),
    ):
        caplog.clear()
        with pytest.raises(KeyboardInterrupt), caplog.at_level("WARNING"):
            toy_trainer(tmp_path, callbacks=[TerminatedAt(step, signal.SIGINT)]).train()
        (record,) = [line for line in caplog.messages if "Interrupted" in line]
        assert re.search(f"Interrupted at step {step}: {message}", record)
