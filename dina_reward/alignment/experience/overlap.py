"""Scores one micro-batch while the next is sampled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch


Result = TypeVar("Result")
Start = Callable[[Callable[[], Result]], Callable[[], Result]]
"""Takes work, and returns what gives its result."""


@contextlib.contextmanager
def scoring(*, overlap: bool) -> Iterator[Start]:
    """Context that gives a function to start work with: in a thread that runs meanwhile, or where its result is asked for.

    Works are done one after another, in the order of their start; errors come with the result.

    Args:
        overlap: whether to use a thread. Worth it where the work waits for somebody else, such as a scoring server.
    """
    if not overlap:
        yield lambda work: work
        return
    executor = ThreadPoolExecutor(1, thread_name_prefix="rewards")
    try:
        # Whether gradients are on is known to each thread alone.
        yield lambda work: executor.submit(torch.no_grad()(work)).result
    finally:
        executor.shutdown(cancel_futures=True)
