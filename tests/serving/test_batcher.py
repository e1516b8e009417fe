"""Who is scored with whom, and when."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dina_reward.serving import RequestError
from dina_reward.serving.batcher import MicroBatcher
from dina_reward.serving.requests import ScoreOptions, ScoreRequest
from dina_reward.serving.scorer import Scores


class Model:
    """Scores a row with its first element; keeps the sizes of batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, requests: Sequence[ScoreRequest]) -> list[Scores]:
        self.gate.wait(10)
        self.batches.append([request.rows for request in requests])
        time.sleep(self.seconds)
        if any(float(request.latents.max()) > 100 for request in requests):
            raise ValueError("too large")
        empty = torch.empty(0)
        return [Scores(request.latents[:, 0, 0, 0], empty, None, empty, empty) for request in requests]


def request(value: float, rows: int = 1, side: int = 2) -> ScoreRequest:
    latents = torch.full((rows, 1, side, side), value)
    return ScoreRequest(latents, False, ["p"] * rows, {}, ScoreOptions(), levels=torch.full((rows,), 0.4))


def with_batcher(model: Model, work: Callable[[Any], Any], *, size: int = 4, wait: float = 200.0) -> Any:
    async def main() -> Any:
        with ThreadPoolExecutor(1) as executor:
            batcher = MicroBatcher(model, executor, max_batch_size=size, max_wait_ms=wait, on_batch=lambda *_: None)
            running = asyncio.create_task(batcher.run())

            async def ask(value: float, seconds: float = 10.0, **shape: int) -> list[float]:
                with batcher.expecting():
                    answer = await batcher.submit(request(value, **shape), time.monotonic() + seconds)
                return answer.scores.scores.tolist()

            ask.batcher = batcher  # type: ignore[attr-defined]
            try:
                return await work(ask)
            finally:
                running.cancel()

    return asyncio.run(main())


def test_a_lone_request_is_taken_at_once() -> None:
    model = Model()

    async def work(ask: Any) -> float:
        started = time.monotonic()
        for value in range(5):
            assert await ask(float(value)) == [value]
        return time.monotonic() - started

    assert with_batcher(model, work, wait=2000.0) < 1.0
    assert model.batches == [[1]] * 5


def test_what_waits_is_scored_together_up_to_the_size_of_a_batch() -> None:
    model = Model()

    async def work(ask: Any) -> None:
        model.gate.clear()
        first = asyncio.create_task(ask(0.0))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(ask(float(value))) for value in range(1, 8)]
        await asyncio.sleep(0.05)
        model.gate.set()
        assert await asyncio.gather(first, *rest) == [[float(value)] for value in range(8)]

    with_batcher(model, work)
    assert model.batches[0] == [1]
    assert [len(batch) for batch in model.batches[1:]] == [4, 3]


def test_clients_that_take_turns_end_up_in_one_batch() -> None:
    model = Model(seconds=0.02)

    async def client(ask: Any, value: float) -> None:
        for _ in range(6):
            assert await ask(value) == [value]
            await asyncio.sleep(0.003)

    async def work(ask: Any) -> None:
        second = asyncio.create_task(client(ask, 2.0))
        await asyncio.sleep(0.01)
        await asyncio.gather(client(ask, 1.0), second)

    with_batcher(model, work)
    assert sum(len(batch) for batch in model.batches) == 12
    assert len(model.batches) <= 8


def test_shapes_do_not_mix_and_the_oldest_comes_first() -> None:
    model = Model()

    async def work(ask: Any) -> None:
        model.gate.clear()
        tasks = [asyncio.create_task(ask(0.0))]
        await asyncio.sleep(0.02)
        for side in (2, 4, 2, 4, 2, 2, 2):
            tasks.append(asyncio.create_task(ask(float(side), side=side)))
            await asyncio.sleep(0.002)
        model.gate.set()
        assert [scores[0] for scores in await asyncio.gather(*tasks)] == [0, 2, 4, 2, 4, 2, 2, 2]

    with_batcher(model, work)
    assert [len(batch) for batch in model.batches] == [1, 4, 2, 1]


def test_a_large_request_is_a_batch_of_its_own() -> None:
    model = Model()

    async def work(ask: Any) -> None:
        model.gate.clear()
        tasks = [asyncio.create_task(ask(0.0))]
        await asyncio.sleep(0.02)
        tasks += [asyncio.create_task(ask(float(rows), rows=rows)) for rows in (2, 9, 2)]
        await asyncio.sleep(0.02)
        model.gate.set()
        assert [len(scores) for scores in await asyncio.gather(*tasks)] == [1, 2, 9, 2]

    with_batcher(model, work)
    assert model.batches == [[1], [2], [9], [2]]


def test_one_that_fails_harms_no_other() -> None:
    model = Model()

    async def work(ask: Any) -> list[Any]:
        model.gate.clear()
        tasks = [asyncio.create_task(ask(0.0))]
        await asyncio.sleep(0.02)
        tasks += [asyncio.create_task(ask(value)) for value in (1.0, 1000.0, 2.0)]
        await asyncio.sleep(0.02)
        model.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = with_batcher(model, work)
    assert [results[0], results[1], results[3]] == [[0.0], [1.0], [2.0]]
    assert isinstance(results[2], RequestError)
    assert (results[2].status, results[2].code) == (422, "not_scorable")


def test_deadlines_and_those_who_go() -> None:
    model = Model()

    async def work(ask: Any) -> None:
        model.gate.clear()
        first = asyncio.create_task(ask(0.0))
        await asyncio.sleep(0.02)
        late, gone = asyncio.create_task(ask(1.0, seconds=0.05)), asyncio.create_task(ask(2.0))
        await asyncio.sleep(0.02)
        gone.cancel()
        with pytest.raises(RequestError, match="not_in_time") as caught:
            await late
        assert (caught.value.status, caught.value.retry_after) == (503, 1)
        assert ask.batcher.queued_rows == 0
        model.gate.set()
        assert await first == [0.0]
        assert ask.batcher.idle

    with_batcher(model, work)
    assert model.batches == [[1]]


def test_what_waits_at_the_end_is_answered() -> None:
    model = Model()

    async def work(ask: Any) -> None:
        model.gate.clear()
        tasks = [asyncio.create_task(ask(float(value))) for value in range(3)]
        await asyncio.sleep(0.02)
        tasks.append(asyncio.create_task(ask(9.0)))
        await asyncio.sleep(0.02)
        ask.batcher.fail_all(RequestError(503, "not_ready", given="", expected="", do=""))
        model.gate.set()
        *scored, refused = await asyncio.gather(*tasks, return_exceptions=True)
        assert scored == [[0.0], [1.0], [2.0]]
        assert isinstance(refused, RequestError)

    with_batcher(model, work)
