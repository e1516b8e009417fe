"""Types as annotated, numbers finite and in their range."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from dina_reward.checks.values import (
    check_choice,
    check_fields,
    check_int,
    check_real,
    check_trainer_numbers,
    checked_int,
    fits,
    scheduler_config_checked,
)


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        (math.nan, float, False),
        (math.inf, float, False),
        ("1", float, False),
        (None, float | None, True),
        (math.nan, float | None, False),
        ([0.1, 1], list[float], True),
        ([0.1, True], list[float], False),
        ("ab", list[str], False),
        ("a", Literal["a", 1], True),
        (True, Literal["a", 1], False),
        ({}, dict[str, Any], True),
    ],
)
def test_values_are_of_the_annotated_type(value: object, hint: object, right: bool) -> None:
    assert fits(value, hint) is right


@dataclass
class Settings:
    rank: int = 4
    levels: list[float] | None = None

    def __post_init__(self) -> None:
        check_fields(self, rank=(1, 8), levels=(0, 1))


def test_ranges_are_closed_and_count_for_every_item() -> None:
    assert Settings(8, [0, 1.0])
    assert Settings(1, None)
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=rf"rank must lie in \[1, 8\], got {wrong}"):
            Settings(wrong)
    with pytest.raises(ValueError, match=r"levels must lie in \[0, 1\], got \[0.5, 1.5\]"):
        Settings(levels=[0.5, 1.5])
    with pytest.raises(ValueError, match="rank must be int, got True"):
        Settings(True)


def test_single_values() -> None:
    check_int(Settings(4), "rank", 4)
    with pytest.raises(ValueError, match="rank must be an integer of at least 5, got 4"):
        check_int(Settings(4), "rank", 5)
    with pytest.raises(ValueError, match="rank must be a number in"):
        check_real(Settings(4), "rank", 0, 3.9)
    with pytest.raises(ValueError, match="unknown loss 'mse'; choose one of nll, fidelity"):
        check_choice("loss", "mse", ("nll", "fidelity"))


TRAINER = {
    "seed": 0,
    "data_seed": None,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": -1,
    "dataloader_num_workers": 0,
    "save_steps": 500,
    "eval_steps": None,
    "logging_steps": 0.1,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "num_train_epochs": 3,
    "adam_epsilon": 1e-8,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "output_dir": "out",
}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("seed", 2**32),
        ("seed", True),
        ("data_seed", -1),
        ("max_steps", -2),
        ("max_steps", 0),
        ("save_steps", 0),
        ("eval_steps", -1),
        ("logging_steps", math.nan),
        ("dataloader_num_workers", -1),
        ("learning_rate", math.nan),
        ("gradient_accumulation_steps", 0),
        ("adam_beta1", 1.5),
        ("adam_beta2", 1),
        ("output_dir", "a\x00b"),
    ],
)
def test_numbers_that_transformers_lets_through(name: str, wrong: object) -> None:
    check_trainer_numbers(SimpleNamespace(**TRAINER))
    with pytest.raises(ValueError, match=name):
        check_trainer_numbers(SimpleNamespace(**{**TRAINER, name: wrong}))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("num_train_timesteps", 10**9), ("num_train_timesteps", 1), ("shift", 0), ("beta_end", math.inf)],
)
def test_schedules_that_cannot_be_built(name: str, wrong: object) -> None:
    right = {"num_train_timesteps": 1000, "shift": 3.0, "lambda_min_clipped": -math.inf}
    assert scheduler_config_checked(right) is right
    with pytest.raises(ValueError, match=name):
        scheduler_config_checked({**right, name: wrong})


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_integers_of_any_kind(value: object) -> None:
    assert checked_int("count", value, 3) == 3


@pytest.mark.parametrize("value", [2, 3.0, True, np.bool_(True), torch.tensor(True), "3", None, [3], math.nan])
def test_what_is_no_integer_or_too_small(value: object) -> None:
    with pytest.raises(ValueError, match="count must be an integer of at least 3, got"):
        checked_int("count", value, 3)
