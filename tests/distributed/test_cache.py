"""Two gloo processes build the same cache as one, and read different halves of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dina_reward.data import BucketBatchSampler, CachedPreferences
from tests.data.cache_world import shard_bytes
from tests.distributed.cache_worker import build


pytestmark = pytest.mark.distributed
JOB = "cache"


@pytest.fixture(scope="module")
def two_ranks(two_processes: Callable[[str], Path]) -> tuple[Path, list[dict[str, Any]]]:
    directory = two_processes(JOB)
    return directory, [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_one_and_two_processes_write_the_same_bytes(
    two_ranks: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    directory, ranks = two_ranks
    assert [rank["world"] for rank in ranks] == [2, 2]
    build(directory / "images", tmp_path / "cache")
    one, two = shard_bytes(tmp_path / "cache"), shard_bytes(directory / "cache")
    assert len(one) == 18
    assert one == two
    manifests = [json.loads((path / "cache" / "manifest.json").read_text()) for path in (directory, tmp_path)]
    assert manifests[0] == manifests[1]


def test_each_rank_reads_other_pairs_of_the_same_bucket(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, ranks = two_ranks
    rows = CachedPreferences(directory / "cache")
    for rank, result in enumerate(ranks):
        sampler = BucketBatchSampler(rows.bucket_of, 3, seed=5, num_replicas=2, rank=rank)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            expected = [sum(float(rows[pair]["chosen"].sum()) for pair in batch) for batch in sampler]
            assert [batch["sum"] for batch in result["epochs"][epoch]] == pytest.approx(expected, rel=1e-4, abs=1e-2)
    for epoch in (0, 1):
        first, second = (rank["epochs"][epoch] for rank in ranks)
        assert [batch["shape"] for batch in first] == [batch["shape"] for batch in second]
        assert [batch["sum"] for batch in first] != [batch["sum"] for batch in second]
    assert ranks[0]["epochs"][0] != ranks[0]["epochs"][1]


def test_each_rank_resumes_inside_its_epoch(two_ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in two_ranks[1]:
        assert rank["resumed"] == rank["epochs"][1][4:]
