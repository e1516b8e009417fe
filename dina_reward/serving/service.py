"""A reward in service: loaded in the background, asked by requests, emptied before it stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from dina_reward import __version__
from dina_reward.reward import LatentReward
from dina_reward.serving.admission import Admission
from dina_reward.serving.batcher import Answer, MicroBatcher
from dina_reward.serving.body import BodyReader
from dina_reward.serving.card import describe
from dina_reward.serving.errors import RequestError
from dina_reward.serving.metrics import ServingMetrics
from dina_reward.serving.requests import ScoreRequest, check_tensors, read_request, row_count
from dina_reward.serving.scorer import BatchScorer
from dina_reward.serving.settings import ServingConfig
from dina_reward.serving.wire import Header


logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "failed"]
LoadReward = Callable[[], LatentReward]

_HEADER_BYTES = {1: 1 << 16, 2: 1 << 20}
_PARSED_IN_PLACE = 1 << 18


class ScoringService:
    """What an application does besides HTTP; belongs to one event loop.

    Args:
        load: makes the reward; called once, in the thread that will score.
        config: limits.
    """

    def __init__(self, load: LoadReward, config: ServingConfig) -> None:
        self.config = config
        self.state: State = "loading"
        self.error: Exception | None = None
        self.info: dict[str, Any] = {}
        self.on_failure: Callable[[], None] = lambda: None
        self._load = load
        self._scorer: BatchScorer | None = None
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="reward")
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="bodies")
        self.admission = Admission(config.max_queue_rows, config.max_queue_bytes)
        self.batcher: MicroBatcher | None = None
        self.metrics = ServingMetrics(
            lambda: 0 if self.batcher is None else self.batcher.queued_rows, lambda: self.admission.bytes
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Context in which requests are served; loading begins with it."""
        self.batcher = MicroBatcher(
            self._score,
            self._model_thread,
            max_batch_size=self.config.max_batch_size,
            max_wait_ms=self.config.max_wait_ms,
            on_batch=self._count_batch,
        )
        tasks = [asyncio.create_task(self._load_reward()), asyncio.create_task(self.batcher.run())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._model_thread.shutdown(wait=False, cancel_futures=True)
            self._readers.shutdown(wait=False, cancel_futures=True)

    def drain(self) -> None:
        """From now on not ready; requests are served all the same."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
            self.metrics.ready.set(0)

    def stop_waiting(self) -> None:
        """Answers what is still queued with 503, so that nobody is left without an answer."""
        if self.batcher is not None:
            self.batcher.fail_all(_not_ready("draining"))

    def check_scorable(self) -> LatentReward:
        """The reward.

        Raises:
            RequestError: 503, there is none yet.
        """
        if self._scorer is None:
            raise _not_ready(self.state)
        return self._scorer.reward

    async def answer(
        self, version: int, chunks: AsyncIterator[bytes], declared: int | None, patience: float
    ) -> tuple[Answer, int]:
        """Scores the rows of a body.

        Args:
            version: of the protocol; version 1's clients wait for room, others are told to come back.
            chunks: the body as it arrives.
            declared: its ``Content-Length``, where there is one.
            patience: seconds that the client waits.

        Returns:
            The answer, and the bytes of the body's tensors.

        Raises:
            RequestError: with the status of the reply.
        """
        reward = self.check_scorable()
        assert self.batcher is not None
        deadline = time.monotonic() + min(patience, self.config.request_timeout)
        held: list[tuple[int, int]] = []

        async def admit(header: Header) -> None:
            check_tensors(header, version, self.config)
            room = (row_count(header), header.data_bytes)
            await self.admission.enter(*room, deadline=deadline, patient=version == 1)
            held.append(room)

        reader = BodyReader(
            chunks,
            declared,
            max_body_bytes=self.config.max_body_bytes,
            max_header_bytes=_HEADER_BYTES[version],
            timeout=self.config.body_timeout,
        )
        with self.batcher.expecting():
            try:
                header, data = await reader.read(admit)
                self.metrics.body_bytes.inc(header.data_bytes)
                request = await self._read_request(header, data, reward)
                answer = await self.batcher.submit(request, deadline)
                self.metrics.queue_seconds.observe(answer.queue_seconds)
                return answer, header.data_bytes
            finally:
                for room in held:
                    self.admission.leave(*room)

    async def _read_request(self, header: Header, data: bytearray, reward: LatentReward) -> ScoreRequest:
        if len(data) <= _PARSED_IN_PLACE:
            return read_request(header, data, reward, self.config)
        loop: Awaitable[ScoreRequest] = asyncio.get_running_loop().run_in_executor(
            self._readers, read_request, header, data, reward, self.config
        )
        return await loop

    async def _load_reward(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            reward = await loop.run_in_executor(self._model_thread, self._load)
            self.info = await loop.run_in_executor(self._model_thread, describe, reward, self.config)
        except Exception as error:
            logger.error(f"The reward cannot be loaded: {error}")
            self.state, self.error = "failed", error
            self.on_failure()
            return
        self._scorer = BatchScorer(reward, self.config.max_batch_size, self.config.prompt_cache_size)
        level = str(reward.config.noise_level)
        self.metrics.model_info.labels(reward.config.family, self.info["weights"], level, __version__).set(1)
        if self.state == "loading":
            self.state = "ready"
            self.metrics.ready.set(1)
            logger.info(f"Ready: a reward of family {reward.config.family} on {reward.device}")

    def _score(self, requests: Any) -> Any:
        assert self._scorer is not None
        return self._scorer(requests)

    def _count_batch(self, requests: int, rows: int, seconds: float) -> None:
        assert self._scorer is not None
        metrics, scorer = self.metrics, self._scorer
        self.admission.scored(rows, seconds)
        metrics.batch_requests.observe(requests)
        metrics.batch_rows.observe(rows)
        metrics.batch_seconds.observe(seconds)
        metrics.prompt_hits.inc(scorer.cache_hits)
        metrics.prompt_misses.inc(scorer.cache_misses)
        scorer.cache_hits = scorer.cache_misses = 0


def _not_ready(state: State) -> RequestError:
    return RequestError(
        503,
        "not_ready",
        given=f"a request while the server is {state}",
        expected="a server that says 200 at /readyz",
        do="send it again after Retry-After seconds, or to another server",
        retry_after=2,
    )
