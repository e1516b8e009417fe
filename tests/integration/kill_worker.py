"""Ends runs of every alignment trainer between and during saves, and resumes them; a job of kill_workers.py.

Each run trains in a forked child that ends by SIGKILL, or is told to by SIGTERM. The parent then resumes it from the last
whole checkpoint, and writes for every case whether weights and averages equal those of the uninterrupted run bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.alignment.helpers import algorithm_trainer, lora_tensors


COMMON: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}


class SignalBetweenSaves(TrainerCallback):
    """Sends its own process a signal after the fifth step, when the checkpoint of the fourth is whole."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), self.number)


def die_while_saving(trainer: Any) -> None:
    """The second checkpoint ends the process when the policy is written and optimizer and random states are not."""
    save, saved = trainer.save_model, []

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        saved.append(args)
        if len(saved) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.save_model = save_and_die


def run_and_die(name: str, directory: Path, moment: str) -> int:
    """Trains in a child; its exit code, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        trainer = algorithm_trainer(name, directory, **COMMON)
        if moment == "during":
            die_while_saving(trainer)
        else:
            trainer.add_callback(SignalBetweenSaves(signal.SIGKILL if moment == "between" else signal.SIGTERM))
        try:
            trainer.train()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    """Trained weights and their averages."""
    weights = lora_tensors(trainer)
    with trainer.averaged_policy():
        return {**weights, **{f"average {name}": tensor for name, tensor in lora_tensors(trainer).items()}}


def main(output: Path, cases: list[list[str]]) -> None:
    report = {}
    for name in dict.fromkeys(name for name, _ in cases):
        straight = algorithm_trainer(name, output / name / "straight", **COMMON)
        straight.train()
        expected = everything(straight)
        for moment in [moment for other, moment in cases if other == name]:
            directory = output / name / moment
            code = run_and_die(name, directory, moment)
            left = sorted(path.name for path in directory.iterdir() if path.is_dir())
            resumed = algorithm_trainer(name, directory, **COMMON)
            resumed.train(resume_from_checkpoint=True)
            actual = everything(resumed)
            report[f"{name} {moment}"] = {
                "code": code,
                "left": left,
                "steps": resumed.state.global_step,
                "tensors": len(expected),
                "different": [key for key in expected if not torch.equal(expected[key], actual[key])],
            }
    (output / "report.json").write_text(json.dumps(report, indent=1))
