"""What commands print besides their results: nothing, on a machine without GPU, torchvision or terminal."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from tests.families.test_guide import NAME as GUIDE_FAMILY
from tests.families.test_guide import guide_code, tiny_aura_flow_pipeline


ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # the first test waits for all commands
HELP_SHARE, INFO_SHARE = 0.4, 1.6  # of the processor time that `import torch` takes on the same machine
RECIPES = ("--directory", str(ROOT / "recipes"))
COMMANDS = {
    "help": ["--help"],
    "recipes": ["recipes", "list", *RECIPES],
    "recipes-validate": ["recipes", "validate", "flow_grpo_shapes", *RECIPES],
    "score-help": ["score", "--help"],
    "info-reward": ["info", "shapes"],
    "info-class": ["info", "StableDiffusion3Pipeline", "--no-flops"],
    "info-json": ["info", "aura_flow", "--json"],
    "score": ["score", "shapes", "0.png", "-p", "a red circle"],
    "eval": ["eval", "shapes", "shapes", "--max-pairs", "8", "--levels", "0.4", "--ensembles", "none"],
    "cache": ["cache", "train.json", "--pipeline", "shapes", "-o", "cache", "--bucket", "32x32", "--prompt-embeds"],
    "convert": ["convert", str(ROOT / "tests" / "fixtures" / "parity" / "case_a" / "reward"), "native"],
}
SLOW_COMMANDS = {
    "demo": ["demo", "--iterations", "1", "-o", "demo"],
    "plan": ["plan", "flow_grpo_sd35_medium_24gb", "--gpus", "1", "--memory", "24"],
}
WRONG_COMMANDS = {
    "wrong-recipe": ["recipes", "validate", "wrong.yaml", *RECIPES],
    "wrong-checkpoint": ["info", "empty"],
}
"""Commands that end with an error; they run in the same process."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images and five pairs of them, the model of a family that is not in the package, and what is wrong."""
    folder = tmp_path_factory.mktemp("commands")
    for number in range(6):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / f"{number}.png")
    rows = [
        {"prompt": "a red circle", "file_path": [f"{row}.png", f"{row + 1}.png"], "human_preference": [1, 0]}
        for row in range(5)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    install_the_guides_family(folder / "installed")
    tiny_aura_flow_pipeline().save_pretrained(folder / "aura_flow")
    (folder / "empty").mkdir()
    shipped = (ROOT / "recipes" / "configs" / "flow_grpo_shapes.yaml").read_text()
    (folder / "wrong.yaml").write_text(shipped + "epsilonn: 1.0e-4\n")
    return folder


def install_the_guides_family(folder: Path) -> None:
    """The worked example of the guide as a package would be installed: a module and its metadata."""
    metadata = folder / "guide_family-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "guide_family.py").write_text(guide_code(), encoding="utf-8")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: guide-family\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[dina_reward.families]\n{GUIDE_FAMILY} = guide_family\n")


def run(
    arguments: list[str], directory: Path, program: Sequence[str] = ("-m", "dina_reward.cli")
) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command in a process of its own, and the processor time that it took in seconds."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(directory / "installed"), os.environ.get("PYTHONPATH"))))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, *program, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@dataclass(frozen=True)
class Printed:
    """Exit code, standard output and standard error of a command, and the heavy modules that were imported at its end."""

    code: int
    output: str
    errors: str
    loaded: list[str]


@pytest.fixture(scope="module")
def printed(request: pytest.FixtureRequest, directory: Path) -> dict[str, Printed]:
    """What each command that is tested does; all run in one new process."""
    tested = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    names = {call.params["name"] for call in tested if call is not None and "name" in call.params}
    by_default = None in tested
    commands = {
        name: arguments
        for name, arguments in {**COMMANDS, **SLOW_COMMANDS, **WRONG_COMMANDS}.items()
        if name in names or (by_default and name not in SLOW_COMMANDS)
    }
    (directory / "commands.json").write_text(json.dumps(commands))
    output = directory / "printed"
    output.mkdir()
    script = Path(__file__).with_name("run_commands.py")
    result, _ = run([str(output), str(directory / "commands.json")], directory, program=[str(script)])
    assert result.returncode == 0, result.stderr
    codes, loaded = (json.loads((output / f"{name}.json").read_text()) for name in ("codes", "loaded"))
    return {
        name: Printed(code, *((output / f"{name}.{end}").read_text() for end in ("out", "err")), loaded=loaded[name])
        for name, code in codes.items()
    }


@pytest.mark.parametrize("name", [*COMMANDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_COMMANDS)])
def test_commands_print_no_noise(printed: dict[str, Printed], name: str) -> None:
    command = printed[name]
    assert command.code == 0, command.errors
    assert command.errors == ""
    assert command.output.strip()


def test_recipes_are_validated_without_a_model_library(printed: dict[str, Printed]) -> None:
    assert printed["recipes-validate"].loaded == []
    assert "diffusers" in printed["score"].loaded


def test_errors_end_in_one_line_with_code_2(printed: dict[str, Printed]) -> None:
    recipe, checkpoint = (printed[name] for name in WRONG_COMMANDS)
    assert recipe.code == checkpoint.code == 2
    assert recipe.output == ""
    assert len(recipe.errors.splitlines()) == 1
    assert recipe.errors == ("error: wrong.yaml: unknown key 'epsilonn' in the configuration; did you mean epsilon?\n")
    assert "Traceback" not in checkpoint.errors
    assert checkpoint.errors.startswith("error: the checkpoint is incomplete")


def test_a_family_is_found_by_its_entry_point(printed: dict[str, Printed]) -> None:
    """As a package would be installed, nothing imported by hand."""
    (card,) = json.loads(printed["info-json"].output)
    assert (card["family"], card["total_blocks"], card["taps"]) == (GUIDE_FAMILY, 4, [1, 2])
    assert (card["latent_shape"], card["head_width"]) == ([4, 8, 8], 32)


@pytest.fixture(scope="module")
def yardstick(directory: Path) -> Callable[[int], float]:
    """``yardstick(attempt)`` is the processor time of `import torch`, measured once for the attempts of all commands."""
    return cache(lambda attempt: run(["import torch"], directory, program=["-c"])[1])


@pytest.mark.parametrize(("arguments", "share"), [(["--help"], HELP_SHARE), (["info", "shapes"], INFO_SHARE)])
def test_commands_start_quickly(
    directory: Path, yardstick: Callable[[int], float], arguments: list[str], share: float
) -> None:
    # Against a yardstick of the same minute, since machines differ and others work on them; the best of up to three.
    def ratio(attempt: int) -> float:
        result, seconds = run(arguments, directory)
        assert result.returncode == 0, result.stderr
        return seconds / yardstick(attempt)

    assert any(ratio(attempt) < share for attempt in range(3))
