"""Kills reward training between and during saves, and by SIGTERM, and resumes it; a job of kill_workers.py."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dina_reward.training import LatentRewardTrainer
from tests.training.tiny_reward import separable_pairs, tiny_reward, trained_parameters, training_config


COMMON: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9}


class EndsAt(TrainerCallback):
    """Sends a signal to its own process after a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def make_trainer(directory: Path) -> LatentRewardTrainer:
    """Every pair has a prompt of its own, so that a resumed process meets others together than the killed one did."""
    pairs = separable_pairs(count=64)
    pairs.prompts = [f"{row} red circles" for row in range(64)]
    return LatentRewardTrainer(tiny_reward(), training_config(directory, **COMMON), train_dataset=pairs)


def run_and_die(directory: Path, moment: str) -> int:
    """Trains in a child; its wait status as an exit code."""
    child = os.fork()
    if child == 0:
        trainer = make_trainer(directory)
        if moment == "during":
            save = trainer._save_rng_state

            def die(output_dir: str) -> None:
                if trainer.state.global_step == 4:
                    os.kill(os.getpid(), signal.SIGKILL)
                save(output_dir)

            trainer._save_rng_state = die  # type: ignore[method-assign]
        else:
            trainer.add_callback(EndsAt(5, signal.SIGKILL if moment == "between" else signal.SIGTERM))
        try:
            trainer.train()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(output: Path) -> None:
    straight = make_trainer(output / "straight")
    straight.train()
    expected = trained_parameters(straight)
    report = {}
    for moment in ("between", "during", "terminated"):
        code = run_and_die(output / moment, moment)
        left = sorted(path.name for path in (output / moment).iterdir() if path.is_dir())
        resumed = make_trainer(output / moment)
        resumed.train(resume_from_checkpoint=True)
        actual = trained_parameters(resumed)
        different = [name for name in expected if not torch.equal(expected[name], actual[name])]
        report[moment] = {"code": code, "left": left, "steps": resumed.state.global_step, "different": different}
    (output / "report.json").write_text(json.dumps(report))
