"""Limits of a scoring server."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dina_reward.checks.values import check_fields


TOKEN_VARIABLE = "DINA_REWARD_TOKEN"
"""Environment variable that holds the bearer token, of the server and of its clients."""

MIB = 1 << 20


@dataclass(frozen=True)
class ServingConfig:
    """Limits of a scoring server.

    Args:
        max_batch_size: rows per pass of the model; a row with several levels or draws counts as that many.
        max_wait_ms: longest time in milliseconds that a row waits for others while the model is idle.
        max_queue_rows: rows that may be read, queued or scored at once.
        max_queue_bytes: bytes of bodies that may be held at once.
        max_body_bytes: largest body.
        max_request_rows: most rows in one request.
        max_draws: most noise levels times noise draws per row.
        request_timeout: seconds after which a request that is still queued is given up; 120 is what version 1's client
            waits for.
        body_timeout: seconds in which a body has to arrive.
        header_timeout: seconds in which the head of a request has to arrive.
        drain_seconds: on SIGTERM, seconds in which requests are still accepted while ``/readyz`` says 503.
        shutdown_timeout: seconds after that in which accepted requests are finished.
        prompt_cache_size: encoded prompts that stay on the device.
        token: clients have to send ``Authorization: Bearer TOKEN``; ``None`` lets everybody in.
        access_log: requests that are logged, one JSON object a line: all, those that failed, or none.
    """

    max_batch_size: int = 8
    max_wait_ms: float = 10.0
    max_queue_rows: int = 8192
    max_queue_bytes: int = 4096 * MIB
    max_body_bytes: int = 256 * MIB
    max_request_rows: int = 1024
    max_draws: int = 64
    request_timeout: float = 120.0
    body_timeout: float = 60.0
    header_timeout: float = 20.0
    drain_seconds: float = 5.0
    shutdown_timeout: float = 20.0
    prompt_cache_size: int = 128
    token: str | None = field(default=None, repr=False)
    access_log: Literal["all", "errors", "off"] = "errors"

    def __post_init__(self) -> None:
        counts = (
            "max_batch_size",
            "max_queue_rows",
            "max_queue_bytes",
            "max_body_bytes",
            "max_request_rows",
            "max_draws",
        )
        seconds = ("request_timeout", "body_timeout", "header_timeout")
        ranges: dict[str, Any] = {**dict.fromkeys(counts, (1, 1 << 48)), **dict.fromkeys(seconds, (1e-3, 86_400))}
        check_fields(
            self,
            **ranges,
            max_wait_ms=(0, 60_000),
            drain_seconds=(0, 86_400),
            shutdown_timeout=(0, 86_400),
            prompt_cache_size=(0, 1 << 20),
        )
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise ValueError("the token must be printable ASCII and not empty; make one with `openssl rand -hex 32`")


def read_token(file: Path | None = None) -> str | None:
    """The bearer token: the content of a file, else the environment variable ``DINA_REWARD_TOKEN``, else ``None``.

    Raises:
        ValueError: the file cannot be read or is empty, or the variable is.
    """
    if file is None:
        token = os.environ.get(TOKEN_VARIABLE)
        if token is not None and not token.strip():
            raise ValueError(f"{TOKEN_VARIABLE} is empty; set it to the token, or unset it for a server without one")
        return None if token is None else token.strip()
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the token file {file} cannot be read: {error}") from error
    if not token:
        raise ValueError(f"the token file {file} is empty; put the token into it")
    return token
