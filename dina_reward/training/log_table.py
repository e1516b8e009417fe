"""What a trainer prints while it runs: a row of a table per log line, whose numbers all stay in ``trainer_state.json``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm
from transformers import (
    IntervalStrategy,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


Cells = Mapping[str, float | str]
"""Values of a row by the titles of their columns."""

ALARM = "ALARM"
"""A cell that is printed in red."""

_MIN_WIDTH = 7


def reward_training_cells(logs: Mapping[str, float]) -> Cells:
    """Loss and accuracy of the pairs trained on and of those held out, under the name of their set if there are several."""
    sets = {key.rpartition("_")[0]: None for key in logs if key.startswith("eval_")}
    cells: dict[str, float | str] = {"loss": logs.get("loss", ""), "accuracy": logs.get("accuracy", "")}
    for where, name in product(sets, ("loss", "accuracy")):
        if f"{where}_{name}" in logs:
            cells[f"{where.removeprefix('eval_').replace('eval', 'held-out')} {name}"] = logs[f"{where}_{name}"]
    return cells


def print_tables(trainer: Trainer, cells_of: Callable[[Mapping[str, float]], Cells]) -> None:
    """Lets this trainer print a table in place of raw dictionaries; other trainers, and notebooks, keep their ways.

    The progress bar stays where there is a terminal, unless ``disable_tqdm`` is set.

    Args:
        trainer: its default `PrinterCallback` or `ProgressCallback` is replaced.
        cells_of: picks the cells of a row, from left to right, out of a log line; a row of empty cells is not printed.
    """
    for callback in trainer.callback_handler.callbacks:
        if type(callback) in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
            if type(callback) is ProgressCallback and sys.stderr.isatty():
                trainer.add_callback(_BarAlone())
            trainer.add_callback(TrainingTable(cells_of))
            return


class TrainingTable(TrainerCallback):
    """Prints step, cells and seconds per optimizer step of every log line, in colour where there is a terminal.

    Columns join the table when a log line first has them; the titles are then printed again. Seconds are those of training
    since the last row that has them, without evaluations and checkpoints. With ``logging_strategy="no"`` the rows are of
    evaluations alone: these have the seconds, and no columns that only training lines fill.

    Args:
        cells_of: see `print_tables`.
    """

    def __init__(self, cells_of: Callable[[Mapping[str, float]], Cells]) -> None:
        self.cells_of = cells_of
        self.columns: list[str] = []
        self._started = 0.0
        self._seconds = 0.0
        self._steps = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops the clock."""
        self._seconds += time.perf_counter() - self._started
        self._steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Prints the row of a log line."""
        logs = logs or {}
        if not state.is_world_process_zero:
            return
        if "train_runtime" in logs:
            _write(f"step {state.global_step} reached after {logs['train_runtime']:.0f} s")
            return
        cells, evaluations_alone = self.cells_of(logs), args.logging_strategy == IntervalStrategy.NO
        if evaluations_alone:
            cells = {title: cell for title, cell in cells.items() if cell != ""}
        if not any(cell != "" for cell in cells.values()):
            return
        if new := [title for title in cells if title not in self.columns]:
            self.columns += new
            self._print_line(self._titles(), "bold")
        seconds: float | str = ""
        if self._steps and ("loss" in logs or evaluations_alone):
            seconds, self._seconds, self._steps = self._seconds / self._steps, 0.0, 0
        row = [state.global_step, *(cells.get(column, "") for column in self.columns), seconds]
        self._print_line(list(map(_printed, row)), "bold red" if ALARM in cells.values() else "")

    def _titles(self) -> list[str]:
        return ["step", *self.columns, "s/step"]

    def _print_line(self, texts: Sequence[str], style: str) -> None:
        widths = [max(len(title), _MIN_WIDTH) for title in self._titles()]
        _write("  ".join(text.rjust(width) for text, width in zip(texts, widths, strict=True)), style)


class _BarAlone(ProgressCallback):
    """The progress bar without the log lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def _printed(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(line: str, style: str = "") -> None:
    """Prints a line above the progress bar; rich leaves the style out where there is no terminal."""
    console = Console(file=sys.stdout)
    with console.capture() as capture:
        console.print(Text(line, style), soft_wrap=True)
    tqdm.write(capture.get().rstrip("\n"), file=sys.stdout)
