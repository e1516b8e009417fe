"""Kills cache builds at random moments until five have died, and finishes the cache; a job of kill_workers.py.

Every attempt runs in a forked child that the parent ends by SIGKILL. The report says what each kill left behind, whether
any finished shard was written again, and whether the files equal those of an uninterrupted run to the byte.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from dina_reward.data import build_cache
from dina_reward.shapes import load_pipeline
from tests.data.cache_world import SETTINGS, ImagePairs, make_pairs, shard_bytes


PAIRS, KILLS = 300, 5
CACHE = replace(SETTINGS, prompt_embeds=True, max_sequence_length=6)


def build(pairs: ImagePairs, pipeline: Any, directory: Path) -> None:
    """One uninterrupted attempt."""
    build_cache(pairs, pipeline, directory, CACHE, progress=False)


def build_and_die(pairs: ImagePairs, pipeline: Any, directory: Path, delay: float) -> int:
    """Builds in a child that is killed after ``delay`` seconds; the signal that ended it, 0 if it was done before."""
    child = os.fork()
    if child == 0:
        build(pairs, pipeline, directory)
        os._exit(0)
    ended, status, until = 0, 0, time.monotonic() + delay
    while not ended and time.monotonic() < until:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def finished_shards(directory: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard: both change when it is written again."""
    stats = {str(path.relative_to(directory)): path.stat() for path in directory.rglob("*.arrow")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def kill_repeatedly(
    pairs: ImagePairs, pipeline: Any, directory: Path, longest: float
) -> tuple[list[dict[str, Any]], list[str]] | None:
    """Kills, each after at most ``longest`` seconds, and shards that were written twice; None if a build was quicker."""
    kills: list[dict[str, Any]] = []
    rewritten: list[str] = []
    known: dict[str, tuple[int, int]] = {}
    for _ in range(KILLS):
        delay = random.uniform(0, longest)
        if build_and_die(pairs, pipeline, directory, delay) != signal.SIGKILL:
            return None
        found = finished_shards(directory)
        rewritten += [name for name, stat in known.items() if found.get(name) != stat]
        known = found
        incomplete = [path.name for path in directory.rglob("*.incomplete")]
        kills.append({"seconds": delay, "shards": len(found), "incomplete": incomplete})
    build(pairs, pipeline, directory)
    found = finished_shards(directory)
    return kills, rewritten + [name for name, stat in known.items() if found.get(name) != stat]


def main(output: Path) -> None:
    random.seed(time.time_ns())
    pipeline = load_pipeline("flow")
    pairs = make_pairs(output / "images", PAIRS)
    started = time.perf_counter()
    build(pairs, pipeline, output / "straight")
    seconds = time.perf_counter() - started
    for attempt, share in enumerate((0.3, 0.15, 0.05)):
        directory = output / f"killed-{attempt}"
        result = kill_repeatedly(pairs, pipeline, directory, share * seconds)
        if result is not None:
            break
    else:
        raise SystemExit("every build ended before its kill")
    expected, actual = shard_bytes(output / "straight"), shard_bytes(directory)
    manifests = [json.loads((path / "manifest.json").read_text()) for path in (output / "straight", directory)]
    report = {
        "kills": result[0],
        "files": len(expected),
        "rewritten": result[1],
        "different": sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name)),
        "same_manifest": manifests[0] == manifests[1],
        "leftovers": [path.name for path in directory.rglob("*.incomplete")],
        "uninterrupted_seconds": seconds,
    }
    (output / "report.json").write_text(json.dumps(report, indent=1))
