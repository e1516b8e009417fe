"""What commands print besides their results: nothing, on a machine without GPU, torchvision or terminal."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # the first test waits for all commands
HELP_SHARE, INFO_SHARE = 0.4, 1.6  # of the processor time that `import torch` takes on the same machine
COMMANDS = {
    "help": ["--help"],
    "score-help": ["score", "--help"],
    "info-reward": ["info", "shapes"],
    "info-class": ["info", "StableDiffusion3Pipeline", "--no-flops"],
    "score": ["score", "shapes", "0.png", "-p", "a red circle"],
    "eval": ["eval", "shapes", "shapes", "--max-pairs", "8", "--levels", "0.4", "--ensembles", "none"],
    "cache": ["cache", "train.json", "--pipeline", "shapes", "-o", "cache", "--bucket", "32x32", "--prompt-embeds"],
    "convert": ["convert", str(ROOT / "tests" / "fixtures" / "parity" / "case_a" / "reward"), "native"],
    "recipes": ["recipes", "list", "--directory", str(ROOT / "recipes")],
    "recipes-validate": ["recipes", "validate", "flow_grpo_shapes", "--directory", str(ROOT / "recipes")],
}
SLOW_COMMANDS = {"demo": ["demo", "--iterations", "1", "-o", "demo"]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images and five pairs of them."""
    folder = tmp_path_factory.mktemp("commands")
    for number in range(6):
        Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / f"{number}.png")
    rows = [
        {"prompt": "a red circle", "file_path": [f"{row}.png", f"{row + 1}.png"], "human_preference": [1, 0]}
        for row in range(5)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def run(
    arguments: list[str], directory: Path, program: Sequence[str] = ("-m", "dina_reward.cli")
) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command in a process of its own, and the processor time that it took in seconds."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
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


@pytest.fixture(scope="module")
def printed(request: pytest.FixtureRequest, directory: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, standard output and standard error of each command that is tested; all run in one new process."""
    tested = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    names = [call.params["name"] for call in tested if call is not None and "name" in call.params]
    commands = {**COMMANDS, **SLOW_COMMANDS}
    (directory / "commands.json").write_text(json.dumps({name: commands[name] for name in names}))
    output = directory / "printed"
    output.mkdir()
    script = Path(__file__).with_name("run_commands.py")
    result, _ = run([str(output), str(directory / "commands.json")], directory, program=[str(script)])
    assert result.returncode == 0, result.stderr
    codes = json.loads((output / "codes.json").read_text())
    return {
        name: (code, *((output / f"{name}.{end}").read_text() for end in ("out", "err")))
        for name, code in codes.items()
    }


@pytest.mark.parametrize("name", [*COMMANDS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_COMMANDS)])
def test_commands_print_no_noise(printed: dict[str, tuple[int, str, str]], name: str) -> None:
    code, output, errors = printed[name]
    assert code == 0, errors
    assert errors == ""
    assert output.strip()


@pytest.mark.parametrize(("arguments", "share"), [(["--help"], HELP_SHARE), (["info", "shapes"], INFO_SHARE)])
def test_commands_start_quickly(directory: Path, arguments: list[str], share: float) -> None:
    # Against a yardstick of the same minute, since machines differ and others work on them; the best of up to three.
    def ratio() -> float:
        return run(arguments, directory)[1] / run(["import torch"], directory, program=["-c"])[1]

    assert any(ratio() < share for _ in range(3))
