"""Batches of one bucket each, at every step the same bucket on all ranks, which `accelerate` would deal out at random.

An epoch resumes exactly where it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class BucketBatchSampler(Sampler[list[int]]):
    """Batch sampler over buckets, for one of several ranks.

    In every epoch, a permutation drawn from ``(seed, epoch)`` orders the pairs of each bucket; ``batch_size *
    num_replicas`` consecutive ones are a *step*, whose first ``batch_size`` go to rank 0, and so on. A second permutation
    orders the steps of all buckets. So at each step all ranks work on the same bucket, on different pairs, and every rank
    has the same number of batches, all of ``batch_size`` pairs.

    *Leftovers.* The pairs of a bucket that do not fill a step

    - are completed by the first ones of the same bucket's order, as often as it takes (``drop_last=False``). These
      repeats, ``padded_pairs`` of them, are the only ones of an epoch; or
    - are left out of this epoch (``drop_last=True``), ``dropped_pairs`` of them. Which ones changes from epoch to epoch,
      but a bucket with fewer than ``batch_size * num_replicas`` pairs is then never seen; or
    - make a last, shorter batch (``pad=False``); only with one replica, for evaluation.

    *Resuming.* What an epoch yields depends on the constructor's arguments and `set_epoch` alone. Resume either by
    `load_state_dict`, which continues behind the batches that were drawn, or by skipping batches, as
    `accelerate.skip_first_batches` and `transformers.Trainer` do; not by both. A loader with workers draws ahead of
    training: save ``state_dict(batches=those trained)`` then.

    Examples:
        >>> sampler = BucketBatchSampler(rows.bucket_of, 4, seed=0, num_replicas=8, rank=0)
        >>> for epoch in range(2):
        ...     sampler.set_epoch(epoch)
        ...     for batch in sampler:
        ...         ...

    Args:
        bucket_of: bucket of each pair, integers, shape ``(pairs,)``.
        batch_size: pairs of one rank's batch.
        seed: of the permutations.
        num_replicas: number of ranks.
        rank: the rank whose batches are yielded.
        shuffle: without it pairs keep their order inside a bucket, and buckets follow one another.
        drop_last, pad: what happens to leftovers, see above.
    """

    def __init__(
        self,
        bucket_of: Any,
        batch_size: int,
        *,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        pad: bool = True,
    ) -> None:
        buckets = np.asarray(bucket_of)
        if buckets.ndim != 1 or buckets.dtype.kind not in "iu" or len(buckets) == 0:
            raise ValueError(
                f"bucket_of must hold one integer per pair, got shape {buckets.shape} and dtype {buckets.dtype}"
            )
        if batch_size < 1 or num_replicas < 1 or not 0 <= rank < num_replicas:
            raise ValueError(
                f"batch_size and num_replicas must be at least 1 and rank below num_replicas, got {batch_size}, "
                f"{num_replicas} and {rank}"
            )
        if seed < 0:
            raise ValueError(f"the seed must not be negative, got {seed}")
        if not pad and (num_replicas > 1 or drop_last):
            raise ValueError("pad=False makes shorter batches, which only one replica without drop_last can have")
        self.batch_size, self.seed, self.num_replicas, self.rank = batch_size, seed, num_replicas, rank
        self.shuffle, self.drop_last, self.pad = shuffle, drop_last, pad
        self._members = [np.flatnonzero(buckets == bucket) for bucket in np.unique(buckets)]
        self._pairs = len(buckets)
        self.epoch = 0
        self._start = self._position = 0
        steps = [self._steps(len(members)) for members in self._members]
        self._length = sum(steps)
        if self._length == 0:
            raise ValueError(
                f"drop_last=True leaves nothing: no bucket has batch_size x num_replicas = {self._step_size} pairs"
            )
        filled = sum(min(count * self._step_size, len(m)) for count, m in zip(steps, self._members, strict=True))
        self.dropped_pairs = self._pairs - filled
        self.padded_pairs = self._length * self._step_size - filled if pad else 0

    @property
    def sampler(self) -> BucketBatchSampler:
        """Itself: where `accelerate` looks for ``set_epoch`` behind a sampler that skips batches."""
        return self

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.num_replicas

    def _steps(self, pairs: int) -> int:
        return pairs // self._step_size if self.drop_last else -(-pairs // self._step_size)

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that is iterated next; another one than the current starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._start, self._position = int(epoch), 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        """All batches of the epoch; the first time after `load_state_dict`, those that were not done yet."""
        start, self._start = self._start, 0
        self._position = start
        batches = self._batches(self.epoch)
        for position in range(start, self._length):
            self._position = position + 1
            yield batches[position]

    def state_dict(self, batches: int | None = None) -> dict[str, int]:
        """Where this epoch stands.

        Args:
            batches: batches of this epoch that are done; default: those that were drawn from the sampler.
        """
        return {**self._identity(), "epoch": self.epoch, "position": self._position if batches is None else batches}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues where `state_dict` was taken; states of all ranks are equal.

        Raises:
            ValueError: the state is of a sampler whose batches are others.
        """
        different = {name: (state.get(name), now) for name, now in self._identity().items() if state.get(name) != now}
        if different:
            details = ", ".join(f"{name} {then} there, {now} here" for name, (then, now) in different.items())
            raise ValueError(
                f"the state belongs to other batches ({details}); resume with the same dataset, seed, batch size and "
                "number of processes"
            )
        position = int(state["position"])
        if not 0 <= position <= self._length:
            raise ValueError(f"the state says {position} batches are done, but an epoch has {self._length}")
        self.epoch = int(state["epoch"]) + position // self._length
        self._start = self._position = position % self._length

    def _identity(self) -> dict[str, int]:
        return {
            "pairs": self._pairs, "buckets": len(self._members), "seed": self.seed, "batch_size": self.batch_size,
            "num_replicas": self.num_replicas, "shuffle": int(self.shuffle), "drop_last": int(self.drop_last),
            "pad": int(self.pad),
        }  # fmt: skip

    def _batches(self, epoch: int) -> list[list[int]]:
        """All batches of this rank in one epoch."""
        # Raw output of a bit generator, which numpy keeps across versions; its permutations may change.
        draws = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        first = self.rank * self.batch_size
        batches: list[list[int]] = []
        for members in self._members:
            order = members[_permutation(draws, len(members))] if self.shuffle else members
            steps = self._steps(len(order))
            for start in range(first, steps * self._step_size, self._step_size):
                stop = start + self.batch_size if self.pad else min(start + self.batch_size, len(order))
                batches.append(order[np.arange(start, stop) % len(order)].tolist())
        if self.shuffle:
            batches = [batches[step] for step in _permutation(draws, len(batches)).tolist()]
        return batches


def _permutation(draws: np.random.PCG64, count: int) -> np.ndarray:
    return np.argsort(draws.random_raw(count), kind="stable")


def bucketed_loader(dataset: Dataset[Any], sampler: BucketBatchSampler, **options: Any) -> Any:
    """Data loader over a rank's own batches, on the device of the running `accelerate` process.

    ``accelerator.prepare`` would divide the batches among the ranks a second time, therefore this function takes its
    place. The loader works with `accelerate.skip_first_batches`.

    Args:
        dataset: e.g. `CachedPreferences`.
        sampler: with the number of processes and the rank of this one.
        options: further arguments of `torch.utils.data.DataLoader`, e.g. ``collate_fn`` and ``num_workers``.
    """
    from accelerate import PartialState
    from accelerate.data_loader import prepare_data_loader

    loader = DataLoader(dataset, batch_sampler=sampler, **options)
    device = PartialState().device
    return prepare_data_loader(
        loader, device, num_processes=1, process_index=0, put_on_device=device != torch.device("cpu")
    )
