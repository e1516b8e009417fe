"""Reads a body as it arrives: head first, then as many bytes as the head says, into memory that was granted for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from dina_reward.serving.errors import RequestError, malformed
from dina_reward.serving.wire import PREFIX, Header, check_size, header_length, parse_header, too_large


Admit = Callable[[Header], Awaitable[None]]
"""Called with the checked header before memory is taken for the data; returns when there is room, or raises."""


class Incoming:
    """The messages of one request: its body as it arrives, and after it the news that the client has gone.

    Args:
        receive: of ASGI.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._ended = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body.

        Raises:
            ClientDisconnect: the client has gone before its end.
        """
        while not self._ended.is_set():
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            if not message.get("more_body", False):
                self._ended.set()
            if body := message.get("body", b""):
                yield body

    async def gone(self) -> None:
        """Returns when the client goes after the body's end."""
        await self._ended.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass


class BodyReader:
    """Reads one safetensors body.

    Args:
        chunks: the body as it arrives.
        declared: its ``Content-Length``, where there is one.
        max_body_bytes: largest body.
        max_header_bytes: longest header.
        timeout: seconds in which all of it has to arrive; time spent in `Admit` does not count.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        declared: int | None,
        *,
        max_body_bytes: int,
        max_header_bytes: int,
        timeout: float,
    ) -> None:
        self._chunks = chunks
        self._declared = declared
        self._limit = max_body_bytes
        self._header_limit = max_header_bytes
        self._left = timeout
        self._timeout = timeout
        self._rest = b""

    async def read(self, admit: Admit) -> tuple[Header, bytearray]:
        """Header and data.

        Raises:
            RequestError: 400 (no safetensors, or another length than it says), 408 (too slow), 413 (too large), or what
                ``admit`` raises.
        """
        if self._declared is not None and self._declared > self._limit:
            raise too_large(self._declared, self._limit)
        length = header_length(await self._exactly(PREFIX), self._header_limit)
        header = parse_header(await self._exactly(length))
        check_size(length, header, self._declared, self._limit)
        await admit(header)
        data = await self._exactly(header.data_bytes)
        if self._rest or await self._next():
            raise malformed("bytes after the last tensor", f"a body that ends after {header.data_bytes} bytes of data")
        return header, data

    async def _exactly(self, count: int) -> bytearray:
        """The next bytes, in memory of that size."""
        data, filled = bytearray(count), 0
        while filled < count:
            chunk = self._rest or await self._next()
            if not chunk:
                raise malformed(f"a body that ends {count - filled} bytes early", "as many bytes as it says")
            taken = min(len(chunk), count - filled)
            data[filled : filled + taken] = memoryview(chunk)[:taken]
            self._rest, filled = bytes(chunk[taken:]), filled + taken
        return data

    async def _next(self) -> bytes:
        """The next chunk that is not empty; nothing at the end."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(max(self._left, 0)):
                async for chunk in self._chunks:
                    if chunk:
                        return chunk
        except TimeoutError:
            raise RequestError(
                408,
                "body_too_slow",
                given=f"a body that did not arrive within {self._timeout:g} s",
                expected="all of it in that time",
                do="send fewer rows per request, or start the server with a longer --body-timeout",
            ) from None
        finally:
            self._left -= time.monotonic() - started
        return b""
