"""What commands print besides their results: nothing, on a machine without GPU, torchvision or terminal."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


ROOT = Path(__file__).parents[2]
HELP_SECONDS, INFO_SECONDS = 0.75, 4.5
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
    "demo": ["demo", "--iterations", "1", "-o", "demo"],
}


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


def run(arguments: list[str], directory: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """A command in a process of its own, and the processor time that it took in seconds."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-m", "dina_reward.cli", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_print_no_noise(directory: Path, name: str) -> None:
    result, _ = run(COMMANDS[name], directory)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.strip()


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], HELP_SECONDS), (["info", "shapes"], INFO_SECONDS)])
def test_commands_start_quickly(directory: Path, arguments: list[str], limit: float) -> None:
    # The quickest of three: other processes on the machine make a run slower, never faster.
    assert min(run(arguments, directory)[1] for _ in range(3)) < limit
