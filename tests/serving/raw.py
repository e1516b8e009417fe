"""Bodies of protocol version 1 as its client makes them, an application called without sockets, and bare sockets."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import urllib3
from safetensors.torch import save


V1_HEADERS = {"content-type": "application/octet-stream", "x-drm-protocol-version": "1"}


def v1_body(reward: Any, latent: torch.Tensor, prompt: str, *, u: float = 0.4, seed: int | None = 0) -> bytes:
    """What the client sends for one sample: one row of each tensor; the prompt's embeddings, not its text."""
    encoded, _ = reward.encode_prompts([prompt])
    tensors = {
        "latents": latent[None],
        "prompt_embeds": encoded.prompt_embeds,
        "pooled_prompt_embeds": encoded.pooled_prompt_embeds,
        "u": torch.tensor([u], dtype=torch.float32),
    }
    if seed is not None:
        tensors["seeds"] = torch.tensor([seed], dtype=torch.int64)
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def post(url: str, body: bytes, headers: Mapping[str, str] = V1_HEADERS, path: str = "/v1/score") -> Any:
    """One request on a connection of its own."""
    return urllib3.request("POST", url + path, body=body, headers=dict(headers), retries=False, timeout=60)


def read_v1(status: int, headers: Mapping[str, str], body: bytes) -> float:
    """The score in a reply, read as strictly as the client does."""
    assert status == 200, body
    assert headers["content-type"].startswith("application/json")
    reply = json.loads(body)
    assert reply["protocol_version"] == "1"
    (score,) = reply["raw_scores"]
    assert isinstance(score, float)
    return score


class App:
    """An application in a running loop, called by ASGI itself."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(
        self,
        path: str = "/v1/score",
        chunks: Sequence[bytes] = (b"",),
        headers: Mapping[str, str] = V1_HEADERS,
        method: str = "POST",
        *,
        length: int | None = None,
        ends: bool = True,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body.

        Args:
            length: the Content-Length to declare.
            ends: whether the body is ended; else the client says nothing more.
        """
        messages = [
            {"type": "http.request", "body": chunk, "more_body": not ends or place < len(chunks) - 1}
            for place, chunk in enumerate(chunks)
        ]
        sent: list[Any] = []

        async def receive() -> Any:
            if messages:
                return messages.pop(0)
            await asyncio.sleep(3600)

        async def send(message: Any) -> None:
            sent.append(message)

        given = dict(headers) | ({} if length is None else {"content-length": str(length)})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
            "client": ("test", 1),
            "server": ("test", 80),
        }
        await self.app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
        names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], names, body


def talk(port: int, data: bytes, timeout: float = 20.0) -> bytes:
    """What a server says to these bytes until it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(data)
        connection.settimeout(timeout)
        heard = b""
        while b"\r\n\r\n" not in heard or not _whole(heard):
            part = connection.recv(65536)
            if not part:
                break
            heard += part
        return heard


def _whole(heard: bytes) -> bool:
    head, _, body = heard.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.partition(b":")[2])
    return False
