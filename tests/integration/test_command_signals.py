"""`dina-reward cache` and `eval` are told to stop on the way; the same command then ends with what it would have written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dina_reward.checkpoints.locking import LOCK_NAME
from tests.data.cache_world import shard_bytes, write_images


ROOT = Path(__file__).parents[2]
CODES = {signal.SIGINT: 130, signal.SIGTERM: -signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}
pytestmark = pytest.mark.slow


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Shells start background jobs with SIGINT ignored, and Python then leaves it so.
    code = "import signal; signal.signal(2, signal.default_int_handler); from dina_reward.cli.__main__ import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def stop_when(begun: Callable[[], bool], process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Sends the signal once the command has begun; what it printed as errors."""
    while not begun():
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == CODES[number], errors
    assert "Traceback" not in errors
    return errors


def finish(*arguments: object) -> None:
    process = start(*arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def test_a_cache(tmp_path: Path) -> None:
    write_images(tmp_path, 204)
    rows = [
        {"prompt": f"prompt {row % 3}", "file_path": [f"{row}.png", f"{row + 4}.png"], "human_preference": [1, 0]}
        for row in range(200)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    command = ["cache", tmp_path / "train.json", "--pipeline", "shapes", "--images-per-shard", "4"]
    command += ["--bucket", "32x32", "--bucket", "48x32", "--bucket", "16", "--device", "cpu"]
    finish(*command, "-o", tmp_path / "whole")
    cache, shards = tmp_path / "cache", 0
    for number in CODES:
        found = shards
        stop_when(lambda found=found: len(list(cache.rglob("*.arrow"))) > found, start(*command, "-o", cache), number)
        shards = len(list(cache.rglob("*.arrow")))
    finish(*command, "-o", cache)
    assert shard_bytes(cache) == shard_bytes(tmp_path / "whole")
    assert {path.name for path in cache.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_an_evaluation(tmp_path: Path) -> None:
    command = ["eval", "shapes", "shapes", "--device", "cpu", "--levels", "0.5", "--ensembles", "none", "-o", tmp_path]
    for number in CODES:
        stop_when((tmp_path / LOCK_NAME).exists, start(*command), number)
        assert not list(tmp_path.glob("evaluation*"))
        (tmp_path / LOCK_NAME).unlink(missing_ok=True)
    finish(*command, "--max-pairs", 40, "--resamples", 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"evaluation.{kind}" for kind in ("json", "md", "png")]
