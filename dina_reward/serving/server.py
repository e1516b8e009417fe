"""Runs the application with uvicorn: heads that never end are cut off, and SIGTERM loses no accepted request."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dina_reward.reward import LatentReward
from dina_reward.serving.app import create_app
from dina_reward.serving.service import LoadReward, ScoringService
from dina_reward.serving.settings import TOKEN_VARIABLE, ServingConfig


logger = logging.getLogger(__name__)

_KEEP_ALIVE = 75
"""Seconds that an idle connection stays open; more than the pools of clients keep theirs, so that these close first."""

_LAST_ANSWERS = 1.0
_LAST_HEADS = 0.2


def serve(
    reward: LatentReward | LoadReward,
    config: ServingConfig | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    **options: Any,
) -> None:
    """Serves a reward until SIGTERM or SIGINT.

    Then ``/readyz`` says 503 while requests are still accepted for `drain_seconds`, so that balancers turn away; after that
    what was accepted is finished, within `shutdown_timeout`. A second signal ends it at once.

    Args:
        reward: the reward, or a function that loads it; the port is open while it loads.
        config: limits.
        host, port: where to listen; port 0 takes a free one.
        options: further settings of `uvicorn.Config`, such as ``uds`` or ``ssl_certfile``.

    Raises:
        ValueError: the reward cannot be loaded.
    """
    config = config or ServingConfig()
    _say_who_is_let_in(config, host)
    app = create_app(reward, config)
    service: ScoringService = app.state.service
    settings: dict[str, Any] = {
        "host": host,
        "port": port,
        "http": protocol_class(config.header_timeout),
        "ws": "none",
        "loop": "asyncio",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "timeout_keep_alive": _KEEP_ALIVE,
        "timeout_graceful_shutdown": max(1, round(config.shutdown_timeout)),
    }
    DrainingServer(uvicorn.Config(app, **{**settings, **options}), service).run()
    if service.error is not None:
        raise ValueError(f"the reward cannot be loaded: {service.error}") from service.error


class DrainingServer(uvicorn.Server):
    """A server that goes on accepting for a while after SIGTERM.

    Args:
        config: of uvicorn.
        service: told to drain.
    """

    def __init__(self, config: uvicorn.Config, service: ScoringService) -> None:
        super().__init__(config)
        self.service = service
        service.on_failure = self._stop
        self._signal: signal.Signals | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain; second: end. It may interrupt anything, so it only sets flags."""
        if self._signal is None:
            self._signal = signal.Signals(sig)
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Comes ten times a second; stops accepting when the time to drain is over."""
        if self._signal is not None and not self.should_exit:
            await self._drain(self._signal)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: Any = None) -> None:
        """Finishes what was accepted; what cannot be in time is answered with 503."""
        patience = max(0.0, self.service.config.shutdown_timeout - _LAST_ANSWERS)
        last_answers = asyncio.get_running_loop().call_later(patience, self.service.stop_waiting)
        for server in self.servers:
            server.close()
        await asyncio.sleep(
            _LAST_HEADS
        )  # what was just sent over open connections is read before idle ones are closed
        await super().shutdown(sockets)
        last_answers.cancel()

    async def _drain(self, received: signal.Signals) -> None:
        seconds = self.service.config.drain_seconds
        logger.info(f"{received.name}: draining for {seconds:g} s")
        self.service.drain()
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while loop.time() < until and not self.should_exit:
            await asyncio.sleep(0.05)
        self.should_exit = True

    def _stop(self) -> None:
        self.should_exit = True


def protocol_class(header_timeout: float) -> type[H11Protocol]:
    """A protocol that closes connections whose request's head does not arrive in time, and refuses garbage in JSON."""

    class Protocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_head()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.close()
                return
            body = json.dumps(
                {"error": "no_http", "given": msg, "expected": "a request of HTTP/1.1", "do": "use an HTTP client"}
            ).encode()
            headers = [
                ("content-type", "application/json"),
                ("connection", "close"),
                ("content-length", str(len(body))),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _watch_head(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget_head()
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(header_timeout, self._head_is_late)

        def _forget_head(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _head_is_late(self) -> None:
            self._head_timer = None
            between = self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]
            if not between and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()

    return Protocol


def _say_who_is_let_in(config: ServingConfig, host: str) -> None:
    if config.token is not None:
        logger.info("Only requests with the bearer token are scored; clients of protocol version 1 cannot send one")
    elif host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning(f"Whoever reaches {host} is served: there is no token, see --token-file and {TOKEN_VARIABLE}")
