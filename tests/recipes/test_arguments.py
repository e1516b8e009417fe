"""Parsing of recipes: the nearest valid key, types of YAML values, one-line errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from dina_reward.recipes.arguments import ConfigParser, checked_value, parse_command_line


@dataclass
class Data:
    """What to read."""

    dataset_name: str = field(metadata={"help": "Name."})
    shuffle: bool = field(default=True, metadata={"help": "Shuffle."})


@dataclass
class Training:
    """How to train."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate."})
    max_steps: int = field(default=10, metadata={"help": "Steps."})
    noise_level: list[float] = field(default_factory=lambda: [0.4], metadata={"help": "Levels."})
    window: list[int] | None = field(default=None, metadata={"help": "Window."})
    strategy: str = field(default="steps", metadata={"help": "Strategy."})

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be positive, got {self.max_steps}")


def parse(tmp_path: Path, text: str, *options: str) -> tuple[Any, ...]:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return ConfigParser((Data, Training)).parse_args_and_config(["--config", str(path), *options])


def test_values_come_from_file_and_command_line_which_wins(tmp_path: Path) -> None:
    text = "dataset_name: d\nlearning_rate: 1e-4\nmax_steps: 3\nnoise_level: 0.2\nwindow: [0, 5]\nshuffle: false\n"
    data, training = parse(tmp_path, text, "--max_steps", "7")
    assert (data.dataset_name, data.shuffle) == ("d", False)
    assert training == Training(learning_rate=1e-4, max_steps=7, noise_level=[0.2], window=[0, 5])
    (data, training) = ConfigParser((Data, Training)).parse_args_and_config(["--dataset_name=x", "--no_shuffle"])
    assert (data.dataset_name, data.shuffle, training.max_steps) == ("x", False, 10)


def test_numbers_that_yaml_takes_for_text_are_numbers_in_lists_too(tmp_path: Path) -> None:
    _, training = parse(tmp_path, "dataset_name: d\nnoise_level: [2e-1, 0.5, 4e-1]\n")
    assert training.noise_level == [0.2, 0.5, 0.4]
    _, training = parse(tmp_path, "dataset_name: d\nnoise_level: 2e-1\n")
    assert training.noise_level == [0.2]
    with pytest.raises(ValueError, match="noise_level must be .*got .'2e-1', 'much'."):
        parse(tmp_path, "dataset_name: d\nnoise_level: [2e-1, much]\n")


def test_the_beginning_of_an_option_is_not_the_option(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown option --max_st; did you mean --max_steps?"):
        parse(tmp_path, "dataset_name: d\n", "--max_st", "7")


@pytest.mark.parametrize("option", [("--window", "null"), ("--window=null",)])
def test_null_on_the_command_line_is_no_value(tmp_path: Path, option: tuple[str, ...]) -> None:
    data, training = parse(tmp_path, "dataset_name: d\nwindow: [0, 5]\n", *option, "--max_steps", "7")
    assert (data.dataset_name, training.window, training.max_steps) == ("d", None, 7)
    (data, training) = ConfigParser((Data, Training)).parse_args_and_config(["--dataset_name", "null", *option])
    assert (data.dataset_name, training.window) == ("null", None)  # a field that needs a string gets one
    with pytest.raises(ValueError, match="max-steps: invalid int value: 'null'"):
        parse(tmp_path, "dataset_name: d\n", "--max_steps", "null")


def test_config_may_be_given_with_an_equals_sign(tmp_path: Path) -> None:
    parse(tmp_path, "dataset_name: d\n")
    data, _ = ConfigParser((Data, Training)).parse_args_and_config([f"--config={tmp_path / 'config.yaml'}"])
    assert data.dataset_name == "d"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("dataset_name: d\nlearning_rat: 1\n", (), "'learning_rat' in the configuration; did you mean learning_rate?"),
        ("dataset_name: d\nlearning-rate: 1\n", (), "'learning-rate' in the configuration; did you mean learning_rate?"),
        ("dataset_name: d\nzzzz: 1\n", (), "unknown key 'zzzz' in the configuration"),
        ("dataset_name: d\n", ("--max_stps", "3"), "unknown option --max_stps; did you mean --max_steps?"),
        ("dataset_name: d\n", ("--max_stps=3",), "unknown option --max_stps; did you mean --max_steps?"),
        ("dataset_name: d\nmax_steps: 1.5\n", (), "max_steps must be int, got 1.5 in the configuration"),
        ("dataset_name: d\nmax_steps: true\n", (), "max_steps must be int, got True in the configuration"),
        ("dataset_name: d\nmax_steps: abc\n", (), "argument --max_steps"),
        ("dataset_name: d\nlearning_rate: [1]\n", (), "learning_rate must be finite float, got [1] in the configuration"),
        ("dataset_name: d\nwindow: [0, 1.5]\n", (), "window must be list[int] | None, got [0, 1.5] in the configuration"),
        ("dataset_name: d\nshuffle: 3\n", (), "shuffle must be bool, got 3 in the configuration"),
        ("dataset_name: d\nstrategy: no\n", (), "must be str, got False in the configuration; quote it to make it a string"),
        ("dataset_name: d\nmax_steps: 0\n", (), "max_steps must be positive, got 0"),
        ("learning_rate: 1\n", (), "the following arguments are required: --dataset_name"),
        ("- a\n- b\n", (), "must contain a YAML mapping"),
        ("a: [1\n", (), "is not valid YAML"),
        ("max_steps: 3\nmax_steps: 4\n", (), "the key 'max_steps' is there twice"),
        ("env:\n  LD_PRELOAD: x\n", (), "has the key 'env'"),
        ("a: !!python/object/apply:os.system [ls]\n", (), "is not valid YAML"),
        ("a: !custom 1\n", (), "is not valid YAML"),
        ("a: " + "[" * 100_000 + "\n", (), "is not valid YAML"),
        ("dataset_name: d\nlearning_rate: .nan\n", (), "learning_rate must be finite float, got nan"),
        ("dataset_name: d\nnoise_level: [.inf]\n", (), "noise_level must be list[float], got [inf]"),
    ],
)  # fmt: skip
def test_faults_are_value_errors_of_one_line(
    tmp_path: Path, text: str, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        parse(tmp_path, text, *options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(ValueError, match="there is no file 'nowhere.yaml'"):
        ConfigParser((Data, Training)).parse_args_and_config(["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3),
        ("1e-4", float, "1e-4"),
        (None, int | None, None),
        ("a", list[str], ["a"]),
        (0.5, list[float] | None, [0.5]),
        ("1e-4", list[float], [1e-4]),
        (["2e-1", "7"], list[str], ["2e-1", "7"]),
        (["a", "b"], list[str] | str | None, ["a", "b"]),
        ("x", Literal["x", "y"], "x"),
        ({"a": 1}, dict | str | None, {"a": 1}),
        (object, Any, object),
    ],
)
def test_values_that_fit(value: Any, hint: Any, expected: Any) -> None:
    assert checked_value("field", value, hint) == expected


@pytest.mark.parametrize(("value", "hint"), [(None, int), ("x", list[float]), (1, Literal["x"]), ({}, str)])
def test_values_that_do_not_fit(value: Any, hint: Any) -> None:
    with pytest.raises(ValueError, match="field must be"):
        checked_value("field", value, hint)


def test_a_script_ends_in_one_line_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(Data, Training, args=["--dataset_name", "x", "--learning_rte", "1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: unknown option --learning_rte; did you mean --learning_rate?\n"
