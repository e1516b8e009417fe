from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from accelerate import skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from dina_reward.data import BucketBatchSampler, bucketed_loader


BUCKETS = st.lists(st.integers(0, 4), min_size=1, max_size=120)


def samplers(bucket_of: Any, batch_size: int, replicas: int, **options: Any) -> list[BucketBatchSampler]:
    return [
        BucketBatchSampler(np.asarray(bucket_of), batch_size, num_replicas=replicas, rank=rank, **options)
        for rank in range(replicas)
    ]


@settings(max_examples=200, deadline=None)
@given(
    bucket_of=BUCKETS,
    batch_size=st.integers(1, 5),
    replicas=st.integers(1, 4),
    seed=st.integers(0, 10),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_padded_epochs(
    bucket_of: list[int], batch_size: int, replicas: int, seed: int, epoch: int, shuffle: bool
) -> None:
    ranks = samplers(bucket_of, batch_size, replicas, seed=seed, shuffle=shuffle)
    for sampler in ranks:
        sampler.set_epoch(epoch)
    epochs = [list(sampler) for sampler in ranks]
    assert {len(batches) for batches in epochs} == {len(ranks[0])}
    for step in zip(*epochs, strict=True):
        assert {len(batch) for batch in step} == {batch_size}
        assert len({bucket_of[pair] for batch in step for pair in batch}) == 1
    seen = Counter(pair for batches in epochs for batch in batches for pair in batch)
    assert set(seen) == set(range(len(bucket_of)))
    assert sum(seen.values()) - len(bucket_of) == ranks[0].padded_pairs
    assert ranks[0].dropped_pairs == 0
    # No pair twice within one step unless its bucket is smaller than the step, and repeats spread evenly.
    for bucket, size in Counter(bucket_of).items():
        counts = [seen[pair] for pair in range(len(bucket_of)) if bucket_of[pair] == bucket]
        assert sum(counts) == -(-size // (batch_size * replicas)) * batch_size * replicas
        assert max(counts) - min(counts) <= 1


@settings(max_examples=100, deadline=None)
@given(bucket_of=BUCKETS, batch_size=st.integers(1, 4), replicas=st.integers(1, 3), seed=st.integers(0, 10))
def test_epochs_without_leftovers(bucket_of: list[int], batch_size: int, replicas: int, seed: int) -> None:
    size = batch_size * replicas
    kept = sum(count // size * size for count in Counter(bucket_of).values())
    if kept == 0:
        with pytest.raises(ValueError, match="leaves nothing"):
            samplers(bucket_of, batch_size, replicas, seed=seed, drop_last=True)
        return
    ranks = samplers(bucket_of, batch_size, replicas, seed=seed, drop_last=True)
    seen = Counter(pair for sampler in ranks for batch in sampler for pair in batch)
    assert max(seen.values()) == 1
    assert len(seen) == kept
    assert (ranks[0].dropped_pairs, ranks[0].padded_pairs) == (len(bucket_of) - kept, 0)


@settings(max_examples=50, deadline=None)
@given(bucket_of=BUCKETS, batch_size=st.integers(1, 7))
def test_short_batches_for_evaluation(bucket_of: list[int], batch_size: int) -> None:
    sampler = BucketBatchSampler(bucket_of, batch_size, seed=0, shuffle=False, pad=False)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(pair for batch in batches for pair in batch) == list(range(len(bucket_of)))
    assert all(len({bucket_of[pair] for pair in batch}) == 1 for batch in batches)
    assert (sampler.dropped_pairs, sampler.padded_pairs) == (0, 0)


@settings(max_examples=100, deadline=None)
@given(
    bucket_of=BUCKETS,
    batch_size=st.integers(1, 4),
    replicas=st.integers(1, 3),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_resuming_inside_an_epoch(
    bucket_of: list[int], batch_size: int, replicas: int, epoch: int, data: st.DataObject
) -> None:
    whole = samplers(bucket_of, batch_size, replicas, seed=3)
    done = data.draw(st.integers(0, len(whole[0])))
    for rank, sampler in enumerate(whole):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        interrupted = samplers(bucket_of, batch_size, replicas, seed=3)[rank]
        interrupted.set_epoch(epoch)
        iterator = iter(interrupted)
        assert [next(iterator) for _ in range(done)] == batches[:done]
        state = interrupted.state_dict()
        assert state == sampler.state_dict(batches=done)
        resumed = samplers(bucket_of, batch_size, replicas, seed=3)[rank]
        resumed.load_state_dict(state)
        if done == len(batches):
            assert resumed.epoch == epoch + 1
            continue
        resumed.set_epoch(epoch)  # as loaders do before they iterate
        assert list(resumed) == batches[done:]
        resumed.set_epoch(epoch + 1)
        sampler.set_epoch(epoch + 1)
        assert list(resumed) == list(sampler)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    buckets = np.arange(200) % 3
    first, again, other = (BucketBatchSampler(buckets, 4, seed=seed) for seed in (1, 1, 2))
    epoch = list(first)
    assert epoch == list(again) == list(first)  # a broken-off or repeated iteration starts from the front
    assert epoch != list(other)
    first.set_epoch(1)
    assert list(first) != epoch
    # Buckets are mixed rather than one after the other.
    order = [buckets[batch[0]] for batch in epoch]
    assert sum(a != b for a, b in pairwise(order)) > 10
    unshuffled = list(BucketBatchSampler(buckets, 4, seed=1, shuffle=False))
    assert unshuffled[0] == [0, 3, 6, 9]
    # Abandoning an iteration has no effect on the next one.
    next(iter(again))
    assert list(again) == epoch


def test_the_permutation_is_pinned() -> None:
    """Resuming across releases: these batches must not change."""
    sampler = BucketBatchSampler(np.array([0, 0, 0, 1, 1, 1, 1, 0]), 2, seed=7)
    sampler.set_epoch(2)
    assert list(sampler) == [[5, 3], [0, 1], [4, 6], [7, 2]]


def test_other_batches_are_refused() -> None:
    state = BucketBatchSampler(np.zeros(10, int), 2, seed=0, num_replicas=2, rank=1).state_dict()
    for options, name in (
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"num_replicas": 1, "rank": 0}, "num_replicas 2 there"),
        ({"batch_size": 3}, "batch_size 2 there"),
        ({"bucket_of": np.zeros(11, int)}, "pairs 10 there"),
        ({"drop_last": True}, "drop_last 0 there"),
    ):
        arguments: dict[str, Any] = {
            "bucket_of": np.zeros(10, int), "batch_size": 2, "seed": 0, "num_replicas": 2, "rank": 0, **options,
        }  # fmt: skip
        with pytest.raises(ValueError, match=name):
            BucketBatchSampler(**arguments).load_state_dict(state)
    sampler = BucketBatchSampler(np.zeros(10, int), 2, seed=0, num_replicas=2, rank=0)
    sampler.load_state_dict(state)  # the states of all ranks are equal
    with pytest.raises(ValueError, match="9 batches are done, but an epoch has 3"):
        sampler.load_state_dict({**state, "position": 9})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_of": []}, "one integer per pair"),
        ({"bucket_of": [0.5]}, "one integer per pair"),
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 1}, "rank"),
        ({"seed": -1}, "seed"),
        ({"pad": False, "num_replicas": 2}, "pad=False"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(**{"bucket_of": [0, 1], "batch_size": 1, "seed": 0, **options})


def test_skipping_batches_as_accelerate_does() -> None:
    buckets = np.arange(50) % 2
    sampler = BucketBatchSampler(buckets, 4, seed=0)
    loader = bucketed_loader(list(range(50)), sampler, collate_fn=list)  # type: ignore[arg-type]
    epochs = [list(loader), list(loader)]
    assert epochs[0] != epochs[1]  # the loader counts epochs
    sampler.set_epoch(1)
    assert list(sampler) == epochs[1]

    resumed = bucketed_loader(list(range(50)), BucketBatchSampler(buckets, 4, seed=0), collate_fn=list)  # type: ignore[arg-type]
    skipped = skip_first_batches(resumed, 5)
    skipped.set_epoch(1)
    assert list(skipped) == epochs[1][5:]


def test_pickling() -> None:
    sampler = BucketBatchSampler(np.arange(50) % 2, 4, seed=0)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


def test_a_million_pairs_are_quick() -> None:
    import time

    started = time.perf_counter()
    sampler = BucketBatchSampler(np.arange(1_000_000) % 13, 4, seed=0, num_replicas=8, rank=3)
    assert sum(1 for _ in sampler) == len(sampler)
    assert time.perf_counter() - started < 5
