"""A cache that is killed by SIGKILL five times at random moments equals an uninterrupted one to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


KILLS = "cache"


def test_five_kills_cost_nothing(killed: Callable[[str], dict[str, Any]]) -> None:
    report = killed(KILLS)
    print(json.dumps(report, indent=1))
    assert len(report["kills"]) == 5
    assert report["files"] > 60
    assert report["kills"][-1]["shards"] < report["files"]
    assert report["rewritten"] == []
    assert report["different"] == []
    assert report["same_manifest"]
    assert report["leftovers"] == []
