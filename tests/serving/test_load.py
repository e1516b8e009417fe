"""Many clients: what batches gain, what a group of equal prompts costs, and connections that only stay open."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Sequence
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
from tests.serving.raw import V1_HEADERS, post, read_v1, v1_body
from tests.serving.test_app import V2_HEADERS
from tests.serving.test_robustness import zeros


PASS_SECONDS = 0.05


@pytest.fixture
def timed(reward: LatentReward) -> Iterator[Running]:
    """A server whose model takes as long for a batch as for a row, as a GPU does that a row leaves idle."""

    def score(requests: Sequence[ScoreRequest]) -> list[Scores]:
        time.sleep(PASS_SECONDS)
        return zeros(requests)

    with running(reward) as server:
        server.service.batcher._score = score
        yield server


def test_32_clients_share_passes(timed: Running, reward: LatentReward) -> None:
    """At least three rows a pass, so three times the rows of one client where passes are what takes time."""
    body = v1_body(reward, torch.zeros(8, 8, 8), PROMPTS[0])

    def client(_: int) -> None:
        with urllib3.PoolManager(maxsize=1, retries=False, timeout=60) as pool:
            for _ in range(4):
                reply = pool.request("POST", f"{timed.url}/v1/score", body=body, headers=V1_HEADERS)
                assert reply.status == 200

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(client, range(32)))
    assert timed.metric("dina_reward_batch_rows_sum") == 128
    assert timed.metric("dina_reward_batch_rows_count") <= 128 / 3


def test_a_group_of_18_requests_with_one_text_encodes_it_once(
    server: Running, reward: LatentReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    family = type(reward.prompt_encoder.family)
    original = family.encode_prompts

    def counted(self: Any, pipeline: Any, prompts: Any, **options: Any) -> Any:
        encoded.append(prompts)
        return original(self, pipeline, prompts, **options)

    monkeypatch.setattr(family, "encode_prompts", counted)
    latents = torch.randn(18, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    prompt = "a small green triangle on a white background"
    options = {"options": json.dumps({"prompts": [prompt]})}
    bodies = [save({"latents": latents[row : row + 1], "seeds": torch.tensor([row])}, options) for row in range(18)]
    with ThreadPoolExecutor(18) as clients:
        replies = list(clients.map(lambda body: post(server.url, body, V2_HEADERS, "/v2/score"), bodies))
    assert [reply.status for reply in replies] == [200] * 18
    assert len(encoded) == 1
    scores = torch.tensor([reply.json()["scores"][0] for reply in replies])
    torch.testing.assert_close(scores, reward(latents, prompt, seed=list(range(18))), rtol=1e-6, atol=0)


def test_300_idle_connections_do_not_stop_scoring(server: Running, reward: LatentReward) -> None:
    body = v1_body(reward, torch.zeros(8, 8, 8), PROMPTS[0])
    idle: list[socket.socket] = []
    try:
        for _ in range(300):
            idle.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        for _ in range(3):
            reply = post(server.url, body)
            read_v1(reply.status, reply.headers, reply.data)
        for connection in idle[::50]:  # each may still ask
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    finally:
        for connection in idle:
            connection.close()
