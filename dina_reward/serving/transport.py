"""Requests to scoring servers: connections that stay open, attempts that wait as they are told, and several servers."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

from dina_reward.checks.stored import parse_json


_AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed."""

_CONNECT_SECONDS = 5.0
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 15.0


class RemoteRewardError(ValueError):
    """A server did not score: it refused, or none could be reached in time.

    Args:
        message: names the server, and what it said was given, expected and to be done.
        status: of HTTP, where a server answered.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Server:
    """One of several servers.

    Args:
        url: without a path.
        rest_until: not asked before then while another one is free; on the clock of `time.monotonic`.
        pauses: failures in a row.
        busy: requests on their way.
    """

    url: str
    rest_until: float = 0.0
    pauses: int = 0
    busy: int = 0


class Transport:
    """Sends requests to the server with the fewest on their way; may be used from several threads.

    A request that fails in a way that may pass (no connection, no answer in time, status 408, 425, 429 or 5xx) is repeated,
    to another server where there is one, until ``timeout`` is over; scores depend on the request alone, so sending it
    twice does no harm. Between attempts at one server it waits for as long as ``Retry-After`` says, else for .25 s, doubled
    with every failure, up to 15 s.

    Args:
        urls: of the servers.
        token: sent as ``Authorization: Bearer``.
        timeout: seconds for a request with all its attempts.
        max_connections: requests on their way at once, per server; so many connections stay open.
    """

    def __init__(self, urls: Sequence[str], *, token: str | None, timeout: float, max_connections: int) -> None:
        self.servers = [Server(_without_path(url)) for url in urls]
        self.timeout = timeout
        self._token = token
        self._pool = urllib3.PoolManager(maxsize=max_connections * len(urls), retries=False)
        self._lock = threading.Lock()

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The JSON of a reply with status 200.

        Args:
            method, path, body, headers: of the request.

        Raises:
            RemoteRewardError: a server refused, or the time is over.
        """
        deadline = time.monotonic() + self.timeout
        last = "no attempt was made"
        status: int | None = None
        while (chosen := self._next(deadline)) is not None:
            try:
                reply = self._attempt(chosen, method, path, body, headers or {}, deadline)
            except HTTPError as error:
                last, status = f"{chosen.url}: {type(error).__name__}: {error}", None
                self._failed(chosen, None)
                continue
            finally:
                with self._lock:
                    chosen.busy -= 1
            if reply.status == 200:
                self._succeeded(chosen)
                return _json(reply, chosen)
            last, status = f"{chosen.url} answered {reply.status}: {_fault(reply)}", reply.status
            if reply.status not in _AGAIN:
                raise RemoteRewardError(last, status)
            self._failed(chosen, reply.headers.get("retry-after"))
        raise RemoteRewardError(f"no scores within {self.timeout:g} s; last, {last}", status)

    def close(self) -> None:
        """Closes idle connections."""
        self._pool.clear()

    def _attempt(
        self,
        server: Server,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        deadline: float,
    ) -> Any:
        left = max(deadline - time.monotonic(), 0.001)
        sent = {**headers, "x-request-timeout": f"{left:.3f}"}
        if self._token is not None:
            sent["authorization"] = f"Bearer {self._token}"
        timeout = urllib3.Timeout(connect=min(_CONNECT_SECONDS, left), read=left)
        return self._pool.request(method, server.url + path, body=body, headers=sent, timeout=timeout, redirect=False)

    def _next(self, deadline: float) -> Server | None:
        """The server to ask, once one is free; ``None`` when that would be too late."""
        while True:
            with self._lock:
                now = time.monotonic()
                rested = [server for server in self.servers if server.rest_until <= now]
                if now >= deadline:
                    return None
                if rested:
                    chosen = min(rested, key=lambda server: (server.busy, server.pauses, random.random()))
                    chosen.busy += 1
                    return chosen
                wake = min(server.rest_until for server in self.servers)
            if wake >= deadline:
                return None
            time.sleep(wake - now)

    def _failed(self, server: Server, retry_after: str | None) -> None:
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**server.pauses) * random.uniform(0.75, 1.25)
        if retry_after is not None and retry_after.isdecimal():
            pause = float(retry_after)
        with self._lock:
            server.pauses += 1
            server.rest_until = time.monotonic() + pause

    def _succeeded(self, server: Server) -> None:
        with self._lock:
            server.pauses, server.rest_until = 0, 0.0


def _without_path(url: str) -> str:
    """``http://host:port``: protocol version 1's clients are configured with the path, so it may be there."""
    parts = urllib3.util.parse_url(url.strip())
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError(f"the address of a scoring server must be like http://host:8000, got {url!r}")
    if parts.path not in (None, "", "/", "/v1/score", "/v2/score") or parts.query:
        raise ValueError(f"the address of a scoring server has no path of its own, got {url!r}; give http://host:port")
    return f"{parts.scheme}://{parts.netloc}"


def _json(reply: Any, server: Server) -> Any:
    try:
        return parse_json(reply.data, f"the reply of {server.url}")
    except ValueError as error:
        raise RemoteRewardError(f"{error}; is that a scoring server?", reply.status) from error


def _fault(reply: Any) -> str:
    """What an error body says; its beginning, if it is not ours."""
    text: str = reply.data.decode(errors="replace")
    try:
        fault = parse_json(text, "the reply")
        return f"{fault['error']}: given {fault['given']}; expected {fault['expected']}; {fault['do']}"
    except (ValueError, KeyError, TypeError):
        return text[:300]


def json_text(values: Mapping[str, Any]) -> str:
    """Values that are not defaults, as JSON."""
    return json.dumps({name: value for name, value in values.items() if value is not None})
