"""A cache that is killed by SIGKILL five times at random moments equals an uninterrupted one to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def test_five_kills_cost_nothing(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("cache_kill_worker.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(worker), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    print(json.dumps(report, indent=1))
    assert len(report["kills"]) == 5
    assert report["files"] > 60
    assert report["kills"][-1]["shards"] < report["files"]
    assert report["rewritten"] == []
    assert report["different"] == []
    assert report["same_manifest"]
    assert report["leftovers"] == []
