"""A second run in a directory that another one is writing into is refused before it does anything."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from dina_reward.checkpoints.locking import LOCK_NAME, DirectoryInUseError
from dina_reward.cli.app import app
from dina_reward.data import build_cache
from dina_reward.distill import JudgeLabeller
from dina_reward.recipes.arguments import _faults_in_one_line
from tests.data.cache_world import SETTINGS, make_pairs
from tests.distill.helpers import PROMPTS, Brightness, NoiseSource
from tests.tiny_models import tiny_sd_pipeline


RECIPES = Path(__file__).parents[2] / "recipes"
HOLDS = """
import fcntl, os, sys
with open(sys.argv[1], "a+") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print(f"pid {os.getpid()} on a machine, run first", file=file, flush=True)
    print("ready", flush=True)
    sys.stdin.readline()
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks of files are of POSIX")


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Path]:
    """A directory that another process is writing into."""
    directory = tmp_path / "taken"
    directory.mkdir()
    command = [sys.executable, "-c", HOLDS, str(directory / LOCK_NAME)]
    with subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        yield directory
        assert [path.name for path in directory.iterdir()] == [LOCK_NAME]
        first.kill()


REFUSED = r"another run is writing into .*taken \(pid \d+ on a machine, run first\); wait for its end"


def recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"two_runs_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_cache(taken: Path, tmp_path: Path) -> None:
    pairs, pipeline = make_pairs(tmp_path / "images", 4), tiny_sd_pipeline()
    with pytest.raises(DirectoryInUseError, match=REFUSED):
        build_cache(pairs, pipeline, taken, SETTINGS, progress=False)


def test_labels_of_a_judge(taken: Path) -> None:
    judge = Brightness()
    with pytest.raises(DirectoryInUseError, match=REFUSED):
        JudgeLabeller(judge).label(taken, NoiseSource(), PROMPTS, 40)
    assert judge.asked == []


def test_an_evaluation(taken: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "shapes", "shapes", "--output", str(taken)])
    with pytest.raises(DirectoryInUseError, match=REFUSED):
        raise result.exception or AssertionError("it ran")


def test_benchmarks(taken: Path) -> None:
    module = recipe("benchmark_rewards")
    arguments = module.BenchmarkArguments(["a=no/such"], functions=["x.y"], output_dir=str(taken))
    with pytest.raises(DirectoryInUseError, match=REFUSED):
        module.main(arguments)


@pytest.mark.parametrize(
    "name", ["ablate_reward", "compare_algorithms", "compare_pixel_reward", "compare_refresh", "compare_search"]
)
def test_comparisons_say_so_in_one_line(
    taken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--output", str(taken)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(DirectoryInUseError, match=REFUSED) as refused:
        recipe(name).main()
    assert sys.excepthook is _faults_in_one_line
    capsys.readouterr()
    sys.excepthook(refused.type, refused.value, refused.tb)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: another run is writing into")


def test_a_complete_cache_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, pipeline = make_pairs(tmp_path / "images", 4), tiny_sd_pipeline()
    report = build_cache(pairs, pipeline, tmp_path / "cache", SETTINGS, progress=False)

    def refuses(directory: Path, run: Any = None) -> None:
        raise PermissionError(13, "Permission denied", str(directory))

    monkeypatch.setattr("dina_reward.data.cache.sole_owner", refuses)
    again = build_cache(pairs, pipeline, tmp_path / "cache", SETTINGS, progress=False)
    assert again.images == report.images
