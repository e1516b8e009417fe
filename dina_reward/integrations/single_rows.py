"""Batches from callers that have one sample each: rows that wait at the same time are scored in one pass."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from dina_reward.checks.tensors import check_tensor
from dina_reward.checks.values import check_kind, check_number, check_text, checked_int
from dina_reward.integrations.scoring import check_reward
from dina_reward.noise.draws import checked_seed


Row = tuple[dict[str, Tensor], dict[str, Any], Future[float]]

_LONGEST_WAIT = 60_000.0


class MicroBatcher:
    """Scores single samples in batches, from any number of threads and event loops.

    Rows of equal shapes, dtypes and options that arrive while others are scored, or within `max_wait_ms` of the first, are
    one batch. A row's score does not depend on the others' beyond rounding, since it has a seed of its own. The thread
    that scores starts with the first row, and does not keep the process alive.

    Args:
        reward: a `LatentReward`, or any callable with its signature.
        max_batch_size: rows of one pass.
        max_wait_ms: how long the first row of a batch waits for others.

    Examples:
        >>> batcher = MicroBatcher(reward)
        >>> batcher.score({"latents": latents[:1]}, prompt="a cat", seed=3)
    """

    def __init__(self, reward: Callable[..., Tensor], *, max_batch_size: int = 16, max_wait_ms: float = 10.0) -> None:
        check_reward(reward)
        check_number("max_wait_ms", max_wait_ms, 0.0, _LONGEST_WAIT)
        self.reward = reward
        self.max_batch_size = checked_int("max_batch_size", max_batch_size, 1)
        self.max_wait = max_wait_ms / 1000
        self.batch_sizes: list[int] = []
        self._rows: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(
        self, tensors: Mapping[str, Tensor], *, seed: int, prompt: str | None = None, **options: Any
    ) -> Future[float]:
        """Hands in one sample.

        Args:
            tensors: arguments of the reward by name, each with one row: ``latents``, and ``prompt_embeds`` and its kin.
            seed: of the row's noise.
            prompt: in place of embeddings.
            options: further arguments; rows with equal ones are scored together.

        Raises:
            ValueError: more rows than one, no latents, or arguments of another kind.
        """
        check_kind("tensors", tensors, Mapping)
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
        wrong = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.shape[:1] != (1,)}
        if wrong or "latents" not in tensors:
            raise ValueError(f"expected `latents` and embeddings with one row each, got {wrong or sorted(tensors)}")
        if prompt is not None:
            check_text("prompt", prompt)
        seed = checked_seed(seed)
        future: Future[float] = Future()
        self._rows.put((dict(tensors), {"seed": seed, "prompt": prompt, "options": options}, future))
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="latent-reward", daemon=True)
                self._thread.start()
        return future

    def score(self, tensors: Mapping[str, Tensor], **row: Any) -> float:
        """`submit`, and waits; errors of the reward are raised here."""
        return self.submit(tensors, **row).result()

    async def score_async(self, tensors: Mapping[str, Tensor], **row: Any) -> float:
        """As `score`, without blocking the event loop."""
        return await asyncio.wrap_future(self.submit(tensors, **row))

    def _run(self) -> None:
        while True:
            rows = [self._rows.get()]
            deadline = time.monotonic() + self.max_wait
            while len(rows) < self.max_batch_size:
                try:
                    rows.append(self._rows.get(timeout=max(0.0, deadline - time.monotonic())))
                except queue.Empty:
                    break
            alike: dict[Any, list[Row]] = defaultdict(list)
            for row in rows:
                alike[_kind(row)].append(row)
            for group in alike.values():
                self._score(group)

    def _score(self, rows: list[Row]) -> None:
        rows = [row for row in rows if row[2].set_running_or_notify_cancel()]
        if not rows:
            return
        self.batch_sizes.append(len(rows))
        try:
            tensors = {name: torch.cat([row[0][name] for row in rows]) for name in rows[0][0]}
            prompts = None if rows[0][1]["prompt"] is None else [row[1]["prompt"] for row in rows]
            seeds = [row[1]["seed"] for row in rows]
            with torch.no_grad():
                scores = self.reward(
                    tensors.pop("latents"), prompts, seed=seeds, **tensors, **rows[0][1]["options"]
                ).tolist()
        except BaseException as error:  # every caller must learn of it, whatever it is
            for row in rows:
                row[2].set_exception(error)
        else:
            for row, score in zip(rows, scores, strict=True):
                row[2].set_result(score)


def _kind(row: Row) -> Any:
    """What rows have to agree in to be scored together."""
    tensors, given, _ = row
    shapes = tuple(sorted((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items()))
    return shapes, given["prompt"] is None, repr(sorted(given["options"].items()))
