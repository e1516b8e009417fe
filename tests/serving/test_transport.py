"""Attempts: which failures are tried again, where, and after how long."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dina_reward.serving import RemoteRewardError
from dina_reward.serving.transport import Transport


class Scripted:
    """A server that answers with given statuses in turn, then with 200."""

    def __init__(self, *replies: tuple[int, dict[str, str]], body: bytes = b'{"fine": true}') -> None:
        self.replies, self.body = list(replies), body
        self.seen: list[tuple[float, Any]] = []
        self.connections: set[Any] = set()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                scripted.seen.append((time.monotonic(), self.headers))
                scripted.connections.add(self.client_address)
                status, headers = scripted.replies.pop(0) if scripted.replies else (200, {})
                if status == 0:
                    self.close_connection = True
                    return
                fault = {"error": "some_fault", "given": "a", "expected": "b", "do": "c"}
                body = scripted.body if status == 200 else json.dumps(fault).encode()
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def scripted() -> Iterator[Any]:
    made: list[Scripted] = []

    def make(*replies: tuple[int, dict[str, str]], **options: Any) -> Scripted:
        made.append(Scripted(*replies, **options))
        return made[-1]

    yield make
    for each in made:
        each.server.shutdown()
        each.server.server_close()


def transport(*urls: str, token: str | None = None, timeout: float = 10.0) -> Transport:
    return Transport(urls, token=token, timeout=timeout, max_connections=2)


def test_a_connection_is_kept(scripted: Any) -> None:
    server = scripted()
    client = transport(server.url, token="abc")
    for _ in range(3):
        assert client.send("POST", "/", b"body") == {"fine": True}
    assert len(server.connections) == 1
    assert server.seen[0][1]["authorization"] == "Bearer abc"
    assert 0 < float(server.seen[0][1]["x-request-timeout"]) <= 10


def test_retry_after_is_honoured(scripted: Any) -> None:
    server = scripted((429, {"retry-after": "1"}))
    transport(server.url).send("POST", "/")
    assert 1.0 <= server.seen[1][0] - server.seen[0][0] < 3.0


@pytest.mark.parametrize("status", [0, 408, 500, 503])
def test_what_may_pass_is_tried_again(scripted: Any, status: int) -> None:
    server = scripted((status, {}), (status, {}))
    transport(server.url).send("POST", "/")
    first, second, third = (moment for moment, _ in server.seen)
    assert second - first > 0.18
    assert third - second > 0.37


@pytest.mark.parametrize("status", [400, 401, 413, 415, 422])
def test_what_cannot_pass_is_not(scripted: Any, status: int) -> None:
    server = scripted((status, {}))
    with pytest.raises(RemoteRewardError, match=f"{status}: some_fault: given a; expected b; c") as caught:
        transport(server.url).send("POST", "/")
    assert caught.value.status == status
    assert len(server.seen) == 1


def test_another_server_is_asked_at_once(scripted: Any) -> None:
    full, free = scripted((503, {"retry-after": "30"})), scripted()
    client = transport(full.url, free.url)
    started = time.monotonic()
    for _ in range(6):
        client.send("POST", "/")
    assert time.monotonic() - started < 5
    assert (len(full.seen), len(free.seen)) in [(1, 6), (0, 6)]


def test_a_server_that_is_not_there_and_the_end_of_patience(scripted: Any) -> None:
    server = scripted()
    client = transport("http://127.0.0.1:9", server.url)
    assert [client.send("POST", "/") for _ in range(4)] == [{"fine": True}] * 4
    with pytest.raises(RemoteRewardError, match=r"no scores within 0\.4 s; last, http://127\.0\.0\.1:9"):
        transport("http://127.0.0.1:9", timeout=0.4).send("POST", "/")
    busy = scripted(*[(503, {"retry-after": "9"})] * 9)
    started = time.monotonic()
    with pytest.raises(RemoteRewardError, match="503: some_fault"):
        transport(busy.url, timeout=2).send("POST", "/")
    assert time.monotonic() - started < 1.5  # it need not wait to know that it would be too late


def test_replies_that_are_no_json(scripted: Any) -> None:
    server = scripted(body=b"<html>")
    with pytest.raises(RemoteRewardError, match="is that a scoring server"):
        transport(server.url).send("POST", "/")
