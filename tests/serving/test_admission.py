"""Rows and bytes that are held at once."""

from __future__ import annotations

import asyncio
import time

import pytest

from dina_reward.serving import RequestError
from dina_reward.serving.admission import Admission


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def test_the_impatient_are_refused_and_the_patient_wait_in_turn() -> None:
    async def main() -> None:
        admission = Admission(4, 100)
        await admission.enter(3, 10, deadline=soon(), patient=False)
        with pytest.raises(RequestError, match="3 of 4 rows") as refused:
            await admission.enter(2, 10, deadline=soon(), patient=False)
        assert (refused.value.status, refused.value.retry_after) == (429, 1)
        order: list[str] = []

        async def enter(name: str, rows: int) -> None:
            await admission.enter(rows, 10, deadline=soon(), patient=True)
            order.append(name)

        waiting = [asyncio.create_task(enter(name, rows)) for name, rows in (("large", 4), ("small", 1))]
        await asyncio.sleep(0.01)
        assert order == []  # one row would fit, but whoever came first is first
        with pytest.raises(RequestError):
            await admission.enter(1, 1, deadline=soon(), patient=False)
        admission.leave(3, 10)
        await asyncio.sleep(0.01)
        assert order == ["large"]
        admission.leave(4, 10)
        await asyncio.gather(*waiting)
        assert order == ["large", "small"]
        assert (admission.rows, admission.bytes) == (1, 10)

    asyncio.run(main())


def test_bytes_count_too_and_what_never_fits_is_413() -> None:
    async def main() -> None:
        admission = Admission(4, 100)
        await admission.enter(1, 90, deadline=soon(), patient=False)
        with pytest.raises(RequestError, match="90 of 100 bytes"):
            await admission.enter(1, 20, deadline=soon(), patient=False)
        for rows, size in ((5, 1), (1, 101)):
            with pytest.raises(RequestError) as caught:
                await admission.enter(rows, size, deadline=soon(), patient=True)
            assert caught.value.status == 413

    asyncio.run(main())


def test_who_gives_up_or_goes_takes_no_room() -> None:
    async def main() -> None:
        admission = Admission(1, 100)
        await admission.enter(1, 1, deadline=soon(), patient=True)
        with pytest.raises(RequestError, match="found no room in time"):
            await admission.enter(1, 1, deadline=soon(0.02), patient=True)
        gone = asyncio.create_task(admission.enter(1, 1, deadline=soon(), patient=True))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        admission.leave(1, 1)
        assert (admission.rows, admission.bytes) == (0, 0)
        late = asyncio.create_task(admission.enter(1, 1, deadline=soon(), patient=True))
        await asyncio.sleep(0)
        await late
        last = asyncio.create_task(admission.enter(1, 1, deadline=soon(), patient=True))
        await asyncio.sleep(0.01)
        admission.leave(1, 1)  # granted, and in the same moment it goes
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)
        assert admission.rows == 0

    asyncio.run(main())


def test_rows_that_could_not_be_scored_in_time_are_not_taken() -> None:
    async def main() -> None:
        admission = Admission(1000, 1000)
        admission.scored(10, 1.0)
        await admission.enter(100, 1, deadline=soon(100), patient=True)
        assert admission.retry_after() == 5
        with pytest.raises(RequestError, match="could not be scored in time"):
            await admission.enter(1, 1, deadline=soon(5), patient=True)
        await admission.enter(1, 1, deadline=soon(50), patient=True)
        for _ in range(40):
            admission.scored(1000, 1.0)
        await admission.enter(1, 1, deadline=soon(1), patient=True)

    asyncio.run(main())
