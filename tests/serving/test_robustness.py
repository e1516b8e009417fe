"""Whatever is sent: an answer that says why not, and a server that scores the next request."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import urllib3
from safetensors.torch import save

from dina_reward import LatentReward
from dina_reward.serving.requests import ScoreRequest
from dina_reward.serving.scorer import Scores
from tests.serving.conftest import PROMPTS, Running, running
from tests.serving.raw import V1_HEADERS, App, post, read_v1, talk, v1_body
from tests.serving.test_app import V2_HEADERS, in_app


MIB = 1 << 20


@pytest.fixture(scope="module")
def body(reward: LatentReward) -> bytes:
    return v1_body(reward, torch.zeros(8, 8, 8), PROMPTS[0])


@pytest.fixture(scope="module")
def body_v2() -> bytes:
    options = {"prompts": PROMPTS, "noise_level": [0.2, 0.4]}
    tensors = {"latents": torch.zeros(2, 8, 8, 8), "seeds": torch.arange(2), "prompt_index": torch.tensor([0, 1])}
    return save(tensors, {"options": json.dumps(options)})


def mutated(body: bytes, chance: random.Random) -> bytes:
    """A body with some of its bytes, of its header's JSON or of its length wrong."""
    length = int.from_bytes(body[:8], "little")
    header, data = body[8 : 8 + length], body[8 + length :]
    kind = chance.randrange(8)
    if kind == 0:  # any bytes, mostly of the header
        changed = bytearray(body)
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(min(len(body), chance.choice((8, 8 + length, len(body)))))] = chance.randrange(
                256
            )
        return bytes(changed)
    if kind == 1:  # cut, or longer than it says
        return body[: chance.randrange(len(body))] if chance.random() < 0.7 else body + chance.randbytes(9)
    if kind == 2:  # nothing of it
        return chance.randbytes(chance.randrange(200))
    if kind == 3:  # another length of the header
        return struct.pack("<Q", chance.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + body[8:]
    if kind == 4:  # other numbers
        values = bytearray(data)
        for _ in range(chance.randint(1, 20)):
            place = chance.randrange(len(values) // 4) * 4
            number = chance.choice((float("nan"), float("inf"), -1e38, 2.0))
            values[place : place + 4] = struct.pack("<f", number)
        return body[: 8 + length] + values
    entries: Any = json.loads(header)
    name = chance.choice(list(entries))
    entry = entries[name]
    if kind == 5:
        entries.pop(name)
    elif kind == 6:
        entries[chance.choice(("latents", "u", "x" * 300, "noise", "", "__metadata__"))] = entries.pop(name)
    elif isinstance(entry, dict) and "shape" in entry:
        part = chance.choice(("dtype", "shape", "data_offsets"))
        entry[part] = chance.choice(
            (
                None,
                [],
                [0],
                [-1, 4],
                [1 << 62] * 3,
                [1.5],
                "F32",
                "I64",
                "BOOL",
                {},
                [0, 1 << 60],
                entry["shape"][::-1],
            )
        )
    else:
        options = {
            "prompts": chance.choice((None, 3, [1], ["\0"], [], "a", {"a": 1})),
            "noise_level": chance.random() * 3,
        }
        entries[name] = {
            "options": json.dumps({**options, chance.choice(("ensemble", "height", "zzz")): chance.randint(-1, 9)})
        }
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def zeros(requests: Sequence[ScoreRequest]) -> list[Scores]:
    """Stands for the model where bodies are many."""
    none = torch.zeros(1)
    return [Scores(torch.zeros(each.rows), torch.zeros(each.rows, 1), None, none, none) for each in requests]


def fuzz(reward: LatentReward, bodies: list[tuple[str, bytes]], count: int, *, model: bool = True) -> Counter[int]:
    """Statuses of mutated bodies, in chunks of any size; a good one is scored after them."""
    chance = random.Random(0)

    async def work(app: App) -> Counter[int]:
        statuses: Counter[int] = Counter()
        if not model:
            app.app.state.service.batcher._score = zeros
        for _ in range(count):
            path, good = chance.choice(bodies)
            sent = mutated(good, chance)
            cuts = sorted(chance.randrange(len(sent) + 1) for _ in range(chance.randrange(3)))
            chunks = [sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)]
            headers = V1_HEADERS if path == "/v1/score" else V2_HEADERS
            status, _, answer = await app(
                path, chunks, headers, length=chance.choice((None, len(sent), len(sent) + 1))
            )
            statuses[status] += 1
            if status != 200:
                fault = json.loads(answer)
                assert all(fault[key] for key in ("error", "given", "expected", "do")), fault
                assert len(answer) < 1500
        for path, good in bodies:
            status, _, answer = await app(path, [good], V1_HEADERS if path == "/v1/score" else V2_HEADERS)
            assert status == 200, answer
        service = app.app.state.service
        assert (service.admission.rows, service.admission.bytes, service.batcher.idle) == (0, 0, True)
        return statuses

    return in_app(reward, work, body_timeout=5.0, max_body_bytes=MIB)


def check(statuses: Counter[int], count: int) -> None:
    assert statuses.keys() <= {200, 400, 413, 422}, statuses
    assert statuses[400] > count / 4
    assert statuses[422] > count / 20


def test_malformed_bodies(reward: LatentReward, body: bytes, body_v2: bytes) -> None:
    check(fuzz(reward, [("/v1/score", body), ("/v2/score", body_v2)], 300), 300)


@pytest.mark.slow
def test_ten_thousand_malformed_bodies(reward: LatentReward, body: bytes, body_v2: bytes) -> None:
    check(fuzz(reward, [("/v1/score", body), ("/v2/score", body_v2)], 10_000, model=False), 10_000)


def test_lengths_that_lie_take_no_memory(reward: LatentReward, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    original = bytearray

    def counted(size: Any = b"") -> bytearray:
        if isinstance(size, int):
            largest.append(size)
        return original(size)

    monkeypatch.setattr("dina_reward.serving.body.bytearray", counted, raising=False)
    header = {"latents": {"dtype": "F32", "shape": [1, 8, 1 << 20, 1 << 10], "data_offsets": [0, 1 << 35]}}
    text = json.dumps(header).encode()

    async def work(app: App) -> None:
        for chunk, length, status in (
            (body, 1 << 31, 413),  # 2 GiB, it says
            (struct.pack("<Q", 1 << 63), None, 400),
            (struct.pack("<Q", len(text)) + text, None, 413),
            (body, len(body) + 1000, 400),
            (body, len(body) - 1, 400),
        ):
            answer = await app(chunks=[chunk], length=length, ends=status == 400 and length is None)
            assert answer[0] == status, answer

    in_app(reward, work, max_body_bytes=MIB)
    assert max(largest) < 1 << 16


def test_many_rows_are_refused_before_they_are_read(reward: LatentReward) -> None:
    body = save({"latents": torch.zeros(40, 8, 2, 2), "prompt_embeds": torch.zeros(1, 1, 1), "u": torch.zeros(40)})

    async def work(app: App) -> None:
        status, _, answer = await app(chunks=[body[:500]], length=len(body), ends=False)
        assert (status, json.loads(answer)["error"]) == (413, "too_many_rows")

    in_app(reward, work, max_request_rows=32)


def test_bodies_that_stop_half_way_are_cut_off(reward: LatentReward, body: bytes) -> None:
    async def work(app: App) -> None:
        started = time.monotonic()
        halves = [app(chunks=[body[:size]], length=len(body), ends=False) for size in (0, 4, 100, len(body) - 1)]
        for status, _, answer in await asyncio.gather(*halves):
            assert (status, json.loads(answer)["error"]) == (408, "body_too_slow")
        assert time.monotonic() - started < 5
        assert (await app(chunks=[body]))[0] == 200

    in_app(reward, work, body_timeout=0.2)


def test_a_full_queue_turns_away_version_2_and_keeps_version_1(
    reward: LatentReward, body: bytes, body_v2: bytes
) -> None:
    async def work(app: App) -> None:
        service = app.app.state.service
        await service.admission.enter(3, 1, deadline=time.monotonic() + 9, patient=False)
        status, headers, answer = await app("/v2/score", [body_v2], V2_HEADERS)
        assert (status, json.loads(answer)["error"], headers["retry-after"]) == (429, "queue_full", "1")
        waiting = asyncio.create_task(app(chunks=[body]))
        late = await app(chunks=[body], headers={**V1_HEADERS, "x-request-timeout": "0.05"})
        assert (late[0], json.loads(late[2])["error"]) == (429, "queue_full")
        assert not waiting.done()
        service.admission.leave(3, 1)
        assert (await waiting)[0] == 200

    in_app(reward, work, max_queue_rows=3)


@pytest.fixture(scope="module")
def strict(reward: LatentReward) -> Any:
    with running(reward, header_timeout=0.5, body_timeout=1.0, max_body_bytes=MIB) as server:
        yield server


def test_garbage_on_the_socket(strict: Running, body: bytes) -> None:
    lies = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\nx-drm-protocol-version: 1\r\n"
    for data in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999999999\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        lies + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        bytes(range(256)) * 40,
    ):
        heard = talk(strict.port, data)
        assert heard == b"" or heard.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), (data[:80], heard[:200])
        if heard:
            assert {"error", "given", "expected", "do"} <= json.loads(heard.partition(b"\r\n\r\n")[2]).keys()
    assert post(strict.url, body).status == 200


def test_a_chunked_body_without_length(strict: Running, body: bytes) -> None:
    head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\nx-drm-protocol-version: 1\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    parts = [body[:5], body[5:700], body[700:]]
    sent = head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    assert talk(strict.port, sent).startswith(b"HTTP/1.1 200")


def test_heads_that_never_end_do_not_stop_scoring(strict: Running, body: bytes) -> None:
    head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\n"
    idle = [socket.create_connection(("127.0.0.1", strict.port), timeout=20) for _ in range(60)]
    try:
        for place, connection in enumerate(idle):
            connection.sendall(head[: place % len(head)])
        assert post(strict.url, body).status == 200
        time.sleep(0.3)
        for connection in idle[::2]:
            connection.sendall(b"x")  # drop by drop
        for connection in idle:
            assert connection.recv(1000) == b""  # cut off all the same
    finally:
        for connection in idle:
            connection.close()
    assert post(strict.url, body).status == 200


def test_connections_between_requests_are_kept(strict: Running, body: bytes) -> None:
    with urllib3.PoolManager(maxsize=1) as pool:
        for wait in (0, 0.8, 0):
            time.sleep(wait)
            assert pool.request("POST", f"{strict.url}/v1/score", body=body, headers=V1_HEADERS).status == 200
        (connections,) = (pool.connection_from_url(strict.url),)
        assert connections.num_connections == 1


def test_a_refused_body_is_read_to_its_end_so_that_the_answer_arrives(strict: Running) -> None:
    head = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n" % (3 * MIB)
    with socket.create_connection(("127.0.0.1", strict.port), timeout=20) as connection:
        connection.sendall(head + bytes(3 * MIB))
        assert connection.recv(100).startswith(b"HTTP/1.1 415")


def concurrent(server: Running, reward: LatentReward, clients: int, distinct: int) -> None:
    latents = torch.randn(distinct, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    bodies = [v1_body(reward, latent, PROMPTS[row % 2], seed=row) for row, latent in enumerate(latents)]
    direct = [
        float(reward(latents[row : row + 1], PROMPTS[row % 2], noise_level=0.4, seed=[row])) for row in range(distinct)
    ]
    with ThreadPoolExecutor(clients) as threads:
        replies = list(threads.map(lambda row: post(server.url, bodies[row % distinct]), range(clients)))
    scores = [read_v1(reply.status, reply.headers, reply.data) for reply in replies]
    for row, score in enumerate(scores):
        assert score == pytest.approx(direct[row % distinct], abs=1e-5)


def test_64_clients_at_once(server: Running, reward: LatentReward) -> None:
    concurrent(server, reward, 64, 8)


@pytest.mark.slow
def test_256_clients_at_once(server: Running, reward: LatentReward) -> None:
    concurrent(server, reward, 256, 32)
    assert server.metric("dina_reward_batch_rows_sum") / server.metric("dina_reward_batch_rows_count") > 2
