from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PrinterCallback, ProgressCallback

from dina_reward.training import log_table
from dina_reward.training.log_table import ALARM, TrainingTable, print_tables, reward_training_cells
from tests.training.tiny_reward import tiny_trainer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Time goes on by two seconds whenever somebody looks."""
    now = [0.0]

    def tick() -> float:
        now[0] += 2
        return now[0]

    monkeypatch.setattr(log_table, "time", SimpleNamespace(perf_counter=tick))
    return now


def log(
    table: TrainingTable, step: int, logs: dict[str, Any], steps: int = 0, main: bool = True, strategy: str = "steps"
) -> None:
    args: Any = SimpleNamespace(logging_strategy=strategy)
    state: Any = SimpleNamespace(global_step=step, is_world_process_zero=main)
    for _ in range(steps):
        table.on_step_begin(None, state, None)  # type: ignore[arg-type]
        table.on_step_end(None, state, None)  # type: ignore[arg-type]
    table.on_log(args, state, None, logs=logs)  # type: ignore[arg-type]


def test_rows_are_aligned_under_titles_that_are_repeated_when_columns_join(capsys, clock):
    table = TrainingTable(lambda logs: {name: value for name, value in logs.items() if name not in ("loss", "lr")})
    log(table, 1, {"loss": 0.0, "reward": -0.123456, "lr": 1.0}, steps=1)
    log(table, 4, {"loss": 0.0, "reward": 12.5}, steps=3)
    log(table, 4, {"held-out reward": 0.5, "alarm": "no"})
    log(table, 5, {"lr": 1.0}, steps=1)
    log(table, 5, {"reward": 1.0}, main=False)
    log(table, 10, {"loss": 0.0, "reward": 1.0}, steps=1)
    log(table, 10, {"train_runtime": 61.4})
    assert capsys.readouterr().out.splitlines() == [
        "   step   reward   s/step",
        "      1  -0.1235        2",
        "      4     12.5        2",
        "   step   reward  held-out reward    alarm   s/step",
        "      4                       0.5       no         ",
        "     10        1                                  2",
        "step 10 reached after 61 s",
    ]


def test_without_training_lines_evaluations_have_the_seconds_and_no_column_is_empty(capsys, clock):
    table = TrainingTable(lambda logs: {"reward": logs.get("reward", ""), "fit": logs["fit"]})
    log(table, 0, {"fit": 0.25}, strategy="no")
    log(table, 20, {"fit": 0.5}, steps=20, strategy="no")
    assert capsys.readouterr().out.splitlines() == [
        "   step      fit   s/step",
        "      0     0.25         ",
        "     20      0.5        2",
    ]


def test_a_terminal_gets_bold_titles_and_red_alarms(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    table = TrainingTable(lambda logs: logs)
    log(table, 3, {"alarm": ALARM})
    assert terminal.getvalue().splitlines() == [
        "\x1b[1m   step    alarm   s/step\x1b[0m",
        "\x1b[1;31m      3    ALARM         \x1b[0m",
    ]


def test_cells_of_reward_training():
    logs = {"loss": 0.5, "accuracy": 0.75, "grad_norm": 3.0, "accuracy/low_noise": 1.0, "loss/low_noise": 0.1}
    assert reward_training_cells(logs) == {"loss": 0.5, "accuracy": 0.75}
    logs = {"eval_loss": 0.4, "eval_accuracy": 0.8, "eval_accuracy_0.4": 0.9, "eval_margin": 2.0}
    expected = {"loss": "", "accuracy": "", "held-out loss": 0.4, "held-out accuracy": 0.8}
    assert reward_training_cells(logs) == expected
    assert reward_training_cells({"eval_hpd_loss": 0.4}) == {"loss": "", "accuracy": "", "hpd loss": 0.4}
    assert reward_training_cells({"train_loss": 0.4, "grad_norm": 1.0}) == {"loss": "", "accuracy": ""}


def test_reward_training_prints_rows_and_keeps_the_raw_lines_in_its_state(tmp_path: Path, capsys):
    trainer = tiny_trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps")
    trainer.train()
    output = capsys.readouterr().out
    lines = [line.split() for line in output.splitlines()]
    assert lines[0] == ["step", "loss", "accuracy", "s/step"]
    assert [line[0] for line in lines[1:]] == ["1", "2", "step", "2", "step"]
    assert lines[3] == ["step", "loss", "accuracy", "held-out", "loss", "held-out", "accuracy", "s/step"]
    assert "{" not in output
    history = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    first, held_out = history[0], history[-1]
    assert lines[1][1:3] == [f"{first['loss']:.4g}", f"{first['accuracy']:.4g}"]
    assert float(lines[1][3]) > 0
    assert lines[4][1:] == [f"{held_out['eval_loss']:.4g}", f"{held_out['eval_accuracy']:.4g}"]
    assert "grad_norm" in first


@pytest.mark.parametrize("terminal", [False, True])
def test_only_the_printing_callbacks_of_this_trainer_are_replaced(tmp_path: Path, monkeypatch, terminal: bool):
    monkeypatch.setattr("sys.stderr", Terminal() if terminal else io.StringIO())
    kinds = [type(callback) for callback in tiny_trainer(tmp_path).callback_handler.callbacks]
    assert TrainingTable in kinds
    assert PrinterCallback not in kinds
    callbacks = tiny_trainer(tmp_path, disable_tqdm=False).callback_handler.callbacks
    assert TrainingTable in map(type, callbacks)
    assert ProgressCallback not in map(type, callbacks)
    bars = [callback for callback in callbacks if isinstance(callback, ProgressCallback)]
    assert len(bars) == terminal
    for bar in bars:
        bar.on_log(None, None, None, logs={"loss": 1.0})


def test_a_notebook_keeps_its_table():
    other = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=["NotebookProgressCallback"]))
    print_tables(other, reward_training_cells)  # type: ignore[arg-type]
    assert other.callback_handler.callbacks == ["NotebookProgressCallback"]
