"""`dina-reward recipes`: list, show, validate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from dina_reward.cli.app import app


RECIPES = Path(__file__).parents[2] / "recipes"


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["recipes", *map(str, arguments)])


def test_list_has_a_line_for_each_configuration() -> None:
    result = invoke("list", "--directory", RECIPES)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["configuration", "recipe", "model", "what", "it", "is"]
    names = [line.split()[0] for line in lines[1:]]
    assert names == sorted(path.stem for path in (RECIPES / "configs").glob("*.yaml"))
    row = next(line for line in lines if line.split()[0] == "ddpo_sd14")
    assert row.split(maxsplit=3)[1:3] == ["ddpo", "stable-diffusion-v1-4"]
    assert "DDPO of Stable Diffusion 1.4" in row


def test_show_prints_the_file() -> None:
    result = invoke("show", "flow_grpo_shapes", "--directory", RECIPES)
    assert result.stdout == (RECIPES / "configs" / "flow_grpo_shapes.yaml").read_text(encoding="utf-8")


def test_validate_takes_processes_and_further_options() -> None:
    result = invoke("validate", "flow_grpo_shapes", "--directory", RECIPES, "--num-processes", 2, "--lora_rank", 8)
    assert result.exit_code == 0, result.output
    assert "2 processes x 96 x 2 = 384 samples = 32 groups of 12" in result.stdout
    result = invoke("validate", "flow_grpo_shapes", "--directory", RECIPES, "--lora_rnak", 8)
    assert isinstance(result.exception, ValueError)
    assert "unknown option --lora_rnak; did you mean --lora_rank?" in str(result.exception)
