"""Every command line in the documentation is one that its program accepts; nothing is run."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dina_reward.cli.app import app
from dina_reward.recipes.alignment import RecipeArguments, classes_of
from dina_reward.recipes.arguments import ConfigParser
from dina_reward.recipes.configs import Launch, RecipeConfig, alignment_command, find_config, parse_config
from dina_reward.recipes.distillation import DistillArguments, DistillTrainingConfig
from dina_reward.recipes.reward_training import TrainRewardArguments
from dina_reward.training import LatentRewardTrainingConfig
from tests.docs.pages import PAGES, ROOT, SOURCES, commands, docstring_commands


OTHER_PROGRAMS = ("ruff", "mypy", "pytest", "mkdocs", "jupyter", ".", "cd")
RECIPES = ROOT / "recipes"


class Parsed(Exception):
    """The arguments of a script are right; it is not run any further."""


def cases() -> Iterator[Any]:
    found = [
        *((page, commands(page)) for page in PAGES),
        *((source, docstring_commands(source)) for source in SOURCES),
    ]
    for path, lines in found:
        for line in dict.fromkeys(lines):
            yield pytest.param(line, id=f"{path.relative_to(ROOT)}: {line[:80]}")


def check_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises if the program that a command line names would refuse it.

    Raises:
        ValueError, SystemExit: it would, or no program is known by that name.
    """
    words = shlex.split(line)
    script = next((word for word in words if re.search(r"(^|/)recipes/\w+\.py$", word)), None)
    if words[0] in ("accelerate", "python") and script is not None and "--config" in words:
        config = words[words.index("--config") + 1]
        parse_config(RecipeConfig(ROOT / config), Launch.parse(line), directory=RECIPES)
        assert (ROOT / config).is_file(), config
    elif words[0] == "accelerate":
        check_command(shlex.join(["python", *words[words.index(str(script)) :]]), monkeypatch)
    elif words[:3] == ["python3", "-m", "venv"]:
        assert len(words) == 4
    elif words[0] == "python":
        check_script(words[1:], monkeypatch)
    elif words[0] == "dina-reward":
        check_dina_reward(words[1:])
    elif words[0] == "pip":
        check_installation(words[1:])
    elif words[0] not in OTHER_PROGRAMS:
        raise ValueError(f"no program {words[0]!r} is known to the documentation's tests")


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a script or module until it has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        parse(self, args, namespace)
        raise Parsed

    module = words[0] == "-m"
    target, arguments = (words[1], words[2:]) if module else (str(ROOT / words[0]), words[1:])
    if not module and Path(words[0]).parts[0] == "examples":
        assert Path(target).is_file(), target  # those take the number of iterations, and run in tests/integration
        return
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [target, *arguments])
    run = runpy.run_module if module else runpy.run_path
    with pytest.raises(Parsed):
        run(target, run_name="__main__")


def check_dina_reward(words: list[str]) -> None:
    """Parses a command line of ours down to its last command, whose body is left out."""
    if words[:1] == ["train"]:
        ConfigParser((TrainRewardArguments, LatentRewardTrainingConfig)).parse_args_and_config(words[1:])
    if words[:1] == ["distill"] and words[1:] != ["PIPELINE"]:
        given = words[1:] if words[1].startswith("--") else ["--model_name_or_path", *words[1:]]
        ConfigParser((DistillArguments, DistillTrainingConfig)).parse_args_and_config(given)
    if words[:1] == ["align"]:
        algorithm, options = alignment_command(words[1], words[2:])
        ConfigParser((RecipeArguments, classes_of(algorithm)[0])).parse_args_and_config(options)
    if words[:2] in (["recipes", "show"], ["recipes", "validate"]) and words[2] != "my.yaml":
        find_config(words[2], RECIPES)
    group = typer.main.get_command(app)
    for command in _leaves(group):
        command.callback = lambda **arguments: None
    group.main(args=words, prog_name="dina-reward", standalone_mode=False)


def _leaves(command: Any) -> Iterator[Any]:
    if not hasattr(command, "commands"):
        yield command
    for child in getattr(command, "commands", {}).values():
        yield from _leaves(child)


def check_installation(words: list[str]) -> None:
    """An installation of this repository under its constraints, with at most one extra, which exists."""
    assert words[:3] == ["install", "-c", "constraints.txt"], words
    assert words[3:4] == ["-e"], words
    match = re.fullmatch(r"\.(?:\[(\w+)\])?", words[4])
    assert match is not None, words
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert match[1] is None or match[1] in extras


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory with what a user would have: the repository's folders and an image."""
    for name in ("recipes", "examples", "tests", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "image.png").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", cases())
def test_command_is_accepted(line: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(line, monkeypatch)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "accelerate launch recipes/flow_grpo.py --config recipes/configs/flow_grpo_sd35_medium.yaml",
            "--dataset_name",
        ),
        ("python recipes/flow_grpo.py --config recipes/configs/flow_grpo_shapes.yaml --lr 1", "--lr"),
        ("dina-reward recipes show flow_grpo_shape", "did you mean flow_grpo_shapes"),
        ("frobnicate --now", "no program"),
    ],
)
def test_wrong_ones_are_refused(line: str, message: str, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=message):
        check_command(line, monkeypatch)


def test_unknown_options_are_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="No such option: --promt"):
        check_command("dina-reward score shapes image.png --promt x", monkeypatch)
    with pytest.raises(SystemExit):
        check_command("python recipes/compare_algorithms.py --outptu x", monkeypatch)
