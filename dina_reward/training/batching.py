"""Batches of one latent shape each, from datasets that say which shape every pair has.

Such a dataset has an attribute ``bucket_of``: for every row a number, equal where latents have equal shapes (a cache of
latents does, see `dina_reward.data`). Training batches are shuffled within buckets; evaluation goes bucket by bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from dina_reward.data.sampler import BucketBatchSampler


def has_buckets(dataset: Any) -> bool:
    """Whether a dataset says which of its rows have latents of one shape."""
    return getattr(dataset, "bucket_of", None) is not None


def buckets_of(dataset: Sized) -> np.ndarray:
    """Bucket of every row, shape ``(rows,)``, int64.

    Raises:
        ValueError: ``bucket_of`` is not one number per row.
    """
    buckets = np.asarray(dataset.bucket_of)  # type: ignore[attr-defined]
    if buckets.shape != (len(dataset),) or buckets.dtype.kind not in "iu":
        raise ValueError(
            f"bucket_of of {type(dataset).__name__} has shape {buckets.shape} and dtype {buckets.dtype}; expected one "
            f"integer for each of its {len(dataset)} rows"
        )
    return buckets.astype(np.int64)


class FirstRows(Sequence[Any]):
    """The first rows of a dataset, read one by one as they are asked for; keeps the buckets where there are any.

    Args:
        dataset: any map-style dataset.
        count: rows, at most.
    """

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self._length = dataset, min(count, len(dataset))
        self.bucket_of = buckets_of(dataset)[: self._length] if has_buckets(dataset) else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(f"row {index} of {self._length}")
        return self.dataset[index % self._length]


def make_batch_sampler(
    dataset: Any, batch_size: int, seed: int, *, num_replicas: int = 1, rank: int = 0
) -> BucketBatchSampler:
    """Shuffled batches of one bucket each, for this rank alone; ranks get different pairs.

    Args:
        dataset: with an attribute ``bucket_of``.
        batch_size: pairs per batch.
        seed: of the order, which changes with every ``set_epoch(epoch)``.
        num_replicas, rank: processes, and which of them this is.
    """
    return BucketBatchSampler(buckets_of(dataset), batch_size, seed=seed, num_replicas=num_replicas, rank=rank)


class SequentialBucketSampler(Sampler[list[int]]):
    """All rows bucket by bucket, in batches of one bucket each, dealt out to the ranks in turn.

    The position of a pair in this order is the same whatever the batch size and the number of ranks, so noise can depend on
    it. Every rank gets equally many batches; where they do not go round, the first ones are repeated (`gather_rows` drops
    the copies).

    Args:
        dataset: with an attribute ``bucket_of``.
        batch_size: pairs per batch.
        num_replicas, rank: processes, and which of them this is.
    """

    def __init__(self, dataset: Any, batch_size: int, *, num_replicas: int = 1, rank: int = 0) -> None:
        self.batch_size = batch_size
        buckets = buckets_of(dataset)
        order = np.argsort(buckets, kind="stable")
        edges = np.flatnonzero(np.diff(buckets[order])) + 1
        starts = [
            (start, min(start + batch_size, int(last)))
            for first, last in zip([0, *edges], [*edges, len(order)], strict=True)
            for start in range(int(first), int(last), batch_size)
        ]
        rounds = -(-len(starts) // num_replicas)
        mine = [starts[(turn * num_replicas + rank) % len(starts)] for turn in range(rounds)]
        self.first_positions = [start for start, _ in mine]
        self.batches = [order[start:stop].tolist() for start, stop in mine]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def gather_rows(rows: Tensor, positions: Tensor) -> Tensor:
    """Rows of all ranks in the order of their positions, each position once; all ranks have to call this together.

    Args:
        rows (`Tensor`): of this rank, shape ``(rows, columns)``, on the CPU.
        positions (`Tensor`): of these rows, shape ``(rows,)``, int64.
    """
    from accelerate.utils import gather_object

    parts = gather_object([(rows, positions)])
    rows, positions = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    order = positions.argsort(stable=True)
    positions = positions[order]
    fresh = torch.ones_like(positions, dtype=torch.bool)
    fresh[1:] = positions[1:] != positions[:-1]
    return rows[order][fresh]
