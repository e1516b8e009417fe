"""The application: routes of both versions of the protocol, probes, metrics and the card, on Starlette."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dina_reward import __version__
from dina_reward.reward import LatentReward
from dina_reward.serving.access import AccessLog, note
from dina_reward.serving.batcher import Answer
from dina_reward.serving.body import Incoming
from dina_reward.serving.errors import RequestError
from dina_reward.serving.service import LoadReward, ScoringService
from dina_reward.serving.settings import ServingConfig


VERSION_HEADER = "x-drm-protocol-version"
TIMEOUT_HEADER = "x-request-timeout"
BODY_TYPE = "application/octet-stream"


def create_app(reward: LatentReward | LoadReward, config: ServingConfig | None = None) -> Starlette:
    """An ASGI application that scores; any ASGI server runs it, `serve` does with uvicorn.

    One process has one model: on several devices run one process each, behind a balancer that asks ``/readyz``.

    Args:
        reward: the reward, or a function without arguments that loads it once the application has started; until then
            requests are answered with 503.
        config: limits; the defaults suit one GPU.

    Returns:
        `starlette.applications.Starlette`, whose ``state.service`` is the `ScoringService`.
    """
    load = (lambda: reward) if isinstance(reward, LatentReward) else reward
    service = ScoringService(load, config or ServingConfig())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.running():
            yield

    routes = [
        Route("/v1/score", _score(service, 1), methods=["POST"]),
        Route("/v2/score", _score(service, 2), methods=["POST"]),
        Route("/v1/info", _info(service)),
        Route("/livez", _alive),
        Route("/readyz", _ready(service)),
        Route("/healthz", _ready(service)),
        Route("/metrics", _metrics(service)),
    ]
    handlers: Any = {RequestError: _refuse(service), HTTPException: _http_error, ClientDisconnect: _gone}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.add_middleware(AccessLog, service=service)
    app.state.service = service
    return app


Endpoint = Callable[[Request], Awaitable[Response]]


def _score(service: ScoringService, version: int) -> Endpoint:
    async def score(request: Request) -> Response:
        _check_token(request, service.config.token)
        service.check_scorable()
        _check_headers(request, version)
        incoming, patience = Incoming(request.receive), _patience(request)
        work = service.answer(version, incoming.chunks(), _declared_length(request), patience)
        answer, size = await _unless_gone(asyncio.create_task(work), incoming)
        rows = len(answer.scores.scores)
        service.metrics.rows.inc(rows)
        note(
            request,
            rows=rows,
            bytes=size,
            queue_ms=round(1000 * answer.queue_seconds, 3),
            score_ms=round(1000 * answer.score_seconds, 3),
            batch_rows=answer.batch_rows,
        )
        return JSONResponse(_reply_v1(answer) if version == 1 else _reply_v2(answer, service.info["weights"]))

    return score


async def _unless_gone(work: asyncio.Task[Any], incoming: Incoming) -> Any:
    """The result of the work, which is given up when the client goes before it is done."""
    gone = asyncio.create_task(incoming.gone())
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


def _check_token(request: Request, token: str | None) -> None:
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Compared whole whatever is given, so that the time says nothing of how much of it is right.
    right = hmac.compare_digest(given.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not right:
        raise RequestError(
            401,
            "not_authorised",
            given="no token, or a wrong one",
            expected="the header Authorization: Bearer TOKEN",
            do="ask whoever runs the server for its token",
        )


def _check_headers(request: Request, version: int) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != BODY_TYPE:
        raise RequestError(
            415,
            "wrong_content_type",
            given=f"content-type {kind[:80]!r}",
            expected=BODY_TYPE,
            do="send the bytes of safetensors.torch.save",
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(
            415,
            "wrong_content_encoding",
            given=f"content-encoding {encoding[:40]!r}",
            expected="an uncompressed body",
            do="send the body as it is",
        )
    given = request.headers.get(VERSION_HEADER)
    if given != str(version):
        raise RequestError(
            400,
            "wrong_protocol_version",
            given=f"{VERSION_HEADER}: {'nothing' if given is None else given[:40]}",
            expected=f"{version} at {request.url.path}",
            do="send that header; GET /v1/info lists the versions",
        )


def _declared_length(request: Request) -> int | None:
    """``Content-Length``; that it is a number, the HTTP server has checked, or no body comes."""
    given = request.headers.get("content-length", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else None


def _patience(request: Request) -> float:
    """Seconds that the client says it waits; for ever by default."""
    try:
        seconds = float(request.headers.get(TIMEOUT_HEADER, "inf"))
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise RequestError(
            400,
            "invalid_timeout",
            given=f"{TIMEOUT_HEADER}: {request.headers.get(TIMEOUT_HEADER, '')[:40]}",
            expected="a positive number of seconds",
            do="leave the header out for the server's own limit",
        )
    return seconds


def _reply_v1(answer: Answer) -> dict[str, Any]:
    return {"protocol_version": "1", "raw_scores": answer.scores.scores.tolist(), "server_version": __version__}


def _reply_v2(answer: Answer, weights: str) -> dict[str, Any]:
    scores = answer.scores
    return {
        "protocol_version": "2",
        "scores": scores.scores.tolist(),
        "level_scores": scores.level_scores.tolist(),
        "noise_std": None if scores.noise_std is None else scores.noise_std.tolist(),
        "noise_levels": scores.noise_levels.tolist(),
        "timesteps": scores.timesteps.tolist(),
        "weights": weights,
        "server_version": __version__,
    }


def _info(service: ScoringService) -> Endpoint:
    async def info(request: Request) -> Response:
        _check_token(request, service.config.token)
        service.check_scorable()
        return JSONResponse(service.info)

    return info


async def _alive(request: Request) -> Response:
    return JSONResponse({"status": "alive"})


def _ready(service: ScoringService) -> Endpoint:
    async def ready(request: Request) -> Response:
        return JSONResponse({"status": service.state}, status_code=200 if service.state == "ready" else 503)

    return ready


def _metrics(service: ScoringService) -> Endpoint:
    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    return metrics


def _refuse(service: ScoringService) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        service.metrics.rejected.labels(error.code).inc()
        note(request, error=error.code)
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    return refuse


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path, or another method."""
    assert isinstance(error, HTTPException)
    body = {
        "error": "no_such_route",
        "given": f"{request.method} {request.url.path[:100]}",
        "expected": "POST /v1/score or /v2/score, GET /v1/info, /livez, /readyz, /healthz or /metrics",
        "do": "correct the address",
    }
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this; the status is for the log."""
    return Response(status_code=499)
