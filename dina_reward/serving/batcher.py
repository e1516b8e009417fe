"""Brings requests that fit together into one pass of the model, without making a lone one wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dina_reward.serving.errors import RequestError, unscorable
from dina_reward.serving.requests import ScoreRequest
from dina_reward.serving.scorer import Scores


logger = logging.getLogger(__name__)

ScoreFunction = Callable[[Sequence[ScoreRequest]], list[Scores]]


@dataclass(frozen=True)
class Answer:
    """Scores of a request, with what became of it.

    Args:
        scores: its scores.
        queue_seconds: time that it waited.
        score_seconds: time of its batch.
        batch_rows: rows of its batch.
    """

    scores: Scores
    queue_seconds: float
    score_seconds: float
    batch_rows: int


@dataclass(frozen=True, eq=False)
class _Waiting:
    request: ScoreRequest
    since: float
    answer: asyncio.Future[Answer]


class MicroBatcher:
    """Scores requests in batches, oldest first, in one thread; used from the event loop alone.

    The model takes the oldest request, with those that fit it, as soon as it is idle and they are `max_batch_size` rows; or
    nobody else is expected; or it has been idle for `max_wait_ms` with requests waiting. Somebody is expected while a body
    is arriving, and while fewer requests wait than were open at once during the batch before, if that was just now. So a
    lone client never waits, and clients that take turns end up in one batch.

    Args:
        score: scores requests with equal keys; called in ``executor``.
        executor: of one thread, which owns the model.
        max_batch_size: rows per batch, a row with several levels or draws counts as that many; a larger request is a
            batch of its own.
        max_wait_ms: see above.
        on_batch: told requests, rows and seconds of every batch.
    """

    def __init__(
        self,
        score: ScoreFunction,
        executor: ThreadPoolExecutor,
        *,
        max_batch_size: int,
        max_wait_ms: float,
        on_batch: Callable[[int, int, float], None],
    ) -> None:
        self._score = score
        self._executor = executor
        self._max_rows = max_batch_size
        self._max_wait = max_wait_ms / 1000
        self._on_batch = on_batch
        self._queues: OrderedDict[Any, deque[_Waiting]] = OrderedDict()
        self._changed = asyncio.Event()
        self._open = 0
        self._queued = 0
        self._crowd = 1
        self._idle_since = 0.0

    @property
    def queued_rows(self) -> int:
        """Rows that wait for a batch."""
        return sum(waiting.request.rows for queue in self._queues.values() for waiting in queue)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, arrives or is being scored."""
        return not self._open

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        """Context around a request from the arrival of its head until it is answered."""
        self._open += 1
        self._crowd = max(self._crowd, self._open)
        self._changed.set()
        try:
            yield
        finally:
            self._open -= 1
            self._changed.set()

    async def submit(self, request: ScoreRequest, deadline: float) -> Answer:
        """Scores of a request; it leaves the queue when it is cancelled or its deadline passes.

        Args:
            request: to be called inside of `expecting`.
            deadline: on the clock of `time.monotonic`.

        Raises:
            RequestError: 422 (its rows cannot be scored) or 503 (not in time).
        """
        waiting = _Waiting(request, time.monotonic(), asyncio.get_running_loop().create_future())
        self._queues.setdefault(request.key, deque()).append(waiting)
        self._queued += 1
        self._changed.set()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await waiting.answer
        except TimeoutError:
            raise RequestError(
                503,
                "not_in_time",
                given=f"a request that waited {time.monotonic() - waiting.since:.1f} s",
                expected="scores before its deadline",
                do="send it again, or to another server",
                retry_after=1,
            ) from None
        finally:
            self._remove(waiting)

    async def run(self) -> None:
        """Starts batches until it is cancelled."""
        while True:
            await self._until_worth_it()
            batch = self._take()
            if batch:
                self._crowd = self._open
                await self._score_batch(batch)
                self._idle_since = time.monotonic()

    def fail_all(self, error: RequestError) -> None:
        """Answers everything that waits with an error."""
        for queue in self._queues.values():
            for waiting in queue:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)

    async def _until_worth_it(self) -> None:
        while True:
            self._changed.clear()
            oldest = min((queue[0] for queue in self._queues.values()), key=lambda w: w.since, default=None)
            if oldest is None:
                await self._changed.wait()
                continue
            now = time.monotonic()
            crowd = self._crowd if now - self._idle_since <= self._max_wait else 1
            everyone = self._open <= self._queued and self._queued >= crowd
            rows = sum(_cost(waiting.request) for waiting in self._queues[oldest.request.key])
            left = max(oldest.since, self._idle_since) + self._max_wait - now
            if everyone or rows >= self._max_rows or left <= 0:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def _take(self) -> list[_Waiting]:
        """The next batch: requests of the oldest one's key, in their order."""
        key = min(self._queues, key=lambda key: self._queues[key][0].since)
        batch: list[_Waiting] = []
        rows = 0
        for waiting in list(self._queues[key]):
            cost = _cost(waiting.request)
            if batch and rows + cost > self._max_rows:
                break
            self._remove(waiting)
            if not waiting.answer.done():
                batch.append(waiting)
                rows += cost
        return batch

    def _remove(self, waiting: _Waiting) -> None:
        queue = self._queues.get(waiting.request.key)
        if queue is not None and waiting in queue:
            queue.remove(waiting)
            self._queued -= 1
            if not queue:
                del self._queues[waiting.request.key]

    async def _score_batch(self, batch: Sequence[_Waiting]) -> None:
        """Scores a batch; if that fails, each request on its own, so that only those at fault fail."""
        started = time.monotonic()
        requests = [waiting.request for waiting in batch]
        loop = asyncio.get_running_loop()
        try:
            scores = await loop.run_in_executor(self._executor, self._score, requests)
        except Exception as error:
            if len(batch) > 1:
                logger.warning(f"A batch of {len(batch)} requests failed, each is scored alone: {error}")
                for waiting in batch:
                    await self._score_batch([waiting])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(_as_request_error(error))
            return
        seconds = time.monotonic() - started
        rows = sum(request.rows for request in requests)
        self._on_batch(len(batch), rows, seconds)
        for waiting, part in zip(batch, scores, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(Answer(part, started - waiting.since, seconds, rows))


def _cost(request: ScoreRequest) -> int:
    return request.rows * request.draws


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValueError):
        return unscorable("not_scorable", str(error)[:500], "rows that this reward can score")
    logger.error("Scoring failed", exc_info=error)
    return RequestError(
        503,
        "scoring_failed",
        given=f"a {type(error).__name__} while scoring",
        expected="scores",
        do="send fewer rows per request; the server's log has the details",
        retry_after=5,
    )
