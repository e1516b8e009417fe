"""One line of JSON per request, its id, and an answer where something unforeseen went wrong."""

from __future__ import annotations

import json
import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


if TYPE_CHECKING:
    from dina_reward.serving.service import ScoringService

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("dina_reward.serving.access_log")
"""Logger of the lines, which are its messages."""

ID_HEADER = "x-request-id"
_PATHS = ("/v1/score", "/v2/score", "/v1/info", "/livez", "/readyz", "/healthz", "/metrics")
_PROBES = ("/livez", "/readyz", "/healthz", "/metrics")
_NOTES = "dina_reward.notes"


def note(request: Request, **facts: Any) -> None:
    """Adds facts to the request's line in the log."""
    request.scope.setdefault(_NOTES, {}).update(facts)


class AccessLog:
    """Middleware: gives every request an id (its own ``x-request-id``, or a new one), counts it and logs it.

    Args:
        app: the application.
        service: whose settings say what is logged, and whose state whether clients are asked to leave.
    """

    def __init__(self, app: ASGIApp, service: ScoringService) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        request_id = _request_id(scope)
        notes: dict[str, Any] = scope.setdefault(_NOTES, {})

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[ID_HEADER] = request_id
                if self.service.state == "draining":
                    headers["connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            logger.error(f"Request {request_id} failed", exc_info=error)
            if not status:
                await _unforeseen(request_id)(scope, receive, send_with_id)
            notes["error"] = type(error).__name__
        finally:
            self._record(scope, status, request_id, time.perf_counter() - started)

    def _record(self, scope: Scope, status: int, request_id: str, seconds: float) -> None:
        path = scope["path"] if scope["path"] in _PATHS else "other"
        self.service.metrics.requests.labels(path, str(status)).inc()
        self.service.metrics.request_seconds.labels(path).observe(seconds)
        wanted = self.service.config.access_log
        if wanted == "off" or (wanted == "errors" and (status < 400 or path in _PROBES)):
            return
        client = scope.get("client")
        line = {
            "time": round(time.time(), 3),
            "id": request_id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:100],
            "status": status,
            "ms": round(1000 * seconds, 3),
            **scope.get(_NOTES, {}),
        }
        access_logger.info(json.dumps(line))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == ID_HEADER.encode():
            given: str = value.decode("latin-1")
            if given.isascii() and given.isprintable() and 0 < len(given) <= 64:
                return given
    return uuid.uuid4().hex


def _unforeseen(request_id: str) -> JSONResponse:
    body = {
        "error": "internal",
        "given": "a request that this server failed on",
        "expected": "scores, or an error that says what is wrong",
        "do": f"look for {request_id} in the server's log",
    }
    return JSONResponse(body, status_code=500)
