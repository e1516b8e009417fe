"""Who may come in: rows and bytes that are held at once are bounded, and memory is granted before it is taken."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass

from dina_reward.serving.errors import RequestError


_LONGEST_RETRY = 60
_MEMORY_OF_RATE = 0.2


@dataclass(frozen=True, eq=False)
class _Asked:
    rows: int
    size: int
    granted: asyncio.Future[None]


class Admission:
    """Grants rows and bytes, first come, first served; used from the event loop alone.

    Args:
        max_rows, max_bytes: that may be held at once.
    """

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        self.max_rows = max_rows
        self.max_bytes = max_bytes
        self.rows = 0
        self.bytes = 0
        self.seconds_per_row = 0.0
        self._asked: deque[_Asked] = deque()

    async def enter(self, rows: int, size: int, *, deadline: float, patient: bool) -> None:
        """Grants rows and bytes, which `leave` gives back.

        Args:
            rows, size: of a request.
            deadline: on the clock of `time.monotonic`, after which its scores are of no use.
            patient: wait for room until then; or refuse at once if there is none.

        Raises:
            RequestError: 413 (never fits) or 429.
        """
        if rows > self.max_rows or size > self.max_bytes:
            raise RequestError(
                413,
                "queue_too_small",
                given=f"{rows} rows of {size} bytes",
                expected=f"at most {self.max_rows} rows and {self.max_bytes} bytes, which is all that may wait here",
                do="send fewer rows per request",
            )
        now = time.monotonic()
        waiting = self.rows + sum(asked.rows for asked in self._asked)
        if waiting * self.seconds_per_row > deadline - now:
            raise self._refusal("rows that could not be scored in time", waiting)
        if not self._asked and self._fits(rows, size):
            self._take(rows, size)
            return
        if not patient:
            raise self._refusal("a request more than fits", waiting)
        asked = _Asked(rows, size, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        try:
            async with asyncio.timeout(deadline - now):
                await asked.granted
        except TimeoutError:
            self._withdraw(asked)
            raise self._refusal("a request that found no room in time", waiting) from None
        except asyncio.CancelledError:
            self._withdraw(asked)
            raise

    def leave(self, rows: int, size: int) -> None:
        """Gives rows and bytes back."""
        self.rows -= rows
        self.bytes -= size
        self._grant()

    def scored(self, rows: int, seconds: float) -> None:
        """Learns how fast rows are scored."""
        pace = seconds / max(rows, 1)
        share = _MEMORY_OF_RATE if self.seconds_per_row else 1.0
        self.seconds_per_row += share * (pace - self.seconds_per_row)

    def retry_after(self) -> int:
        """Whole seconds after which about half of what waits now is scored."""
        return max(1, min(_LONGEST_RETRY, math.ceil(self.rows * self.seconds_per_row / 2)))

    def _fits(self, rows: int, size: int) -> bool:
        return self.rows + rows <= self.max_rows and self.bytes + size <= self.max_bytes

    def _take(self, rows: int, size: int) -> None:
        self.rows += rows
        self.bytes += size

    def _grant(self) -> None:
        while self._asked and self._fits(self._asked[0].rows, self._asked[0].size):
            asked = self._asked.popleft()
            if not asked.granted.done():
                self._take(asked.rows, asked.size)
                asked.granted.set_result(None)

    def _withdraw(self, asked: _Asked) -> None:
        """Takes somebody who has gone out of the row; what was granted at that very moment is given back."""
        if asked in self._asked:
            self._asked.remove(asked)
            self._grant()
        elif asked.granted.done() and not asked.granted.cancelled():
            self.leave(asked.rows, asked.size)

    def _refusal(self, what: str, waiting: int) -> RequestError:
        return RequestError(
            429,
            "queue_full",
            given=what,
            expected=f"room: {waiting} of {self.max_rows} rows and {self.bytes} of {self.max_bytes} bytes are taken",
            do="send it again after Retry-After seconds",
            retry_after=self.retry_after(),
        )
