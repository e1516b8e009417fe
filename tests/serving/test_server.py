"""SIGTERM loses no accepted request, and the command serves a reward from start to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import urllib3

from dina_reward import LatentReward
from dina_reward.serving import ServingConfig, serve
from tests.serving.conftest import PROMPTS, Running
from tests.serving.raw import V1_HEADERS, v1_body


def status(url: str, path: str) -> int:
    return urllib3.request("GET", url + path, retries=False, timeout=10).status


def test_after_the_signal_requests_are_still_scored_and_then_all_is_finished(reward: LatentReward) -> None:
    server = Running(reward, ServingConfig(drain_seconds=3.0, shutdown_timeout=20))
    server.start()
    body = v1_body(reward, torch.zeros(8, 8, 8), PROMPTS[0])
    slow = server.service.batcher
    assert slow is not None
    original = slow._score
    slow._score = lambda requests: (time.sleep(0.05), original(requests))[1]
    statuses: list[int] = []
    leave = threading.Event()

    def client() -> None:
        with urllib3.PoolManager(maxsize=1, retries=False, timeout=30) as pool:
            while not leave.is_set():
                reply = pool.request("POST", f"{server.url}/v1/score", body=body, headers=V1_HEADERS)
                statuses.append(reply.status)
                leave.wait(0.01)

    with ThreadPoolExecutor(24) as threads:
        clients = [threads.submit(client) for _ in range(24)]
        time.sleep(0.3)
        server.server.handle_exit(signal.SIGTERM, None)
        deadline = time.monotonic() + 2
        while status(server.url, "/readyz") == 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert status(server.url, "/livez") == 200
        before = len(statuses)
        time.sleep(0.3)
        assert len(statuses) > before  # still scored
        leave.set()  # as a balancer does
        for each in clients:
            each.result()  # nobody was cut off
    server.thread.join(30)
    assert not server.thread.is_alive()
    assert set(statuses) == {200}
    with pytest.raises(urllib3.exceptions.HTTPError):
        status(server.url, "/livez")


def test_what_cannot_be_finished_is_answered(reward: LatentReward) -> None:
    server = Running(reward, ServingConfig(drain_seconds=0.0, shutdown_timeout=1.2))
    server.start()
    gate = threading.Event()
    batcher = server.service.batcher
    assert batcher is not None
    original = batcher._score
    batcher._score = lambda requests: (gate.wait(20), original(requests))[1]
    body = v1_body(reward, torch.zeros(8, 8, 8), PROMPTS[0])

    def ask() -> tuple[int, Any]:
        reply = urllib3.request(
            "POST", f"{server.url}/v1/score", body=body, headers=V1_HEADERS, retries=False, timeout=30
        )
        return reply.status, json.loads(reply.data).get("error")

    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(ask)
        time.sleep(0.2)
        rest = [threads.submit(ask) for _ in range(3)]
        time.sleep(0.2)
        server.server.handle_exit(signal.SIGTERM, None)
        assert [each.result() for each in rest] == [(503, "not_ready")] * 3
        gate.set()
        first.result()
    server.thread.join(30)
    assert not server.thread.is_alive()


def test_a_reward_that_cannot_be_loaded_ends_it() -> None:
    def load() -> LatentReward:
        raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="cannot be loaded: no such checkpoint"):
        serve(load, port=0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(900)  # a busy machine takes minutes to import what is served
def test_the_command_from_start_to_sigterm_under_load(tmp_path: Path, reward: LatentReward) -> None:
    port, token = free_port(), tmp_path / "token"
    token.write_text("s3cret\n")
    options = {
        "model-path": "shapes",
        "base-model-path": "shapes",
        "dtype": "float32",
        "max-batch-size": "8",
        "max-wait-ms": "10",
        "host": "127.0.0.1",
        "port": str(port),
        "token-file": str(token),
        "drain-seconds": "2",
        "access-log": "all",
    }
    command = [sys.executable, "-m", "dina_reward.cli", "serve", *(f"--{k}={v}" for k, v in options.items())]
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    body = v1_body(reward, torch.zeros(8, 8, 8), PROMPTS[0])
    expected = float(reward(torch.zeros(1, 8, 8, 8), PROMPTS[0], noise_level=0.4, seed=[0]))
    headers = {**V1_HEADERS, "authorization": "Bearer s3cret"}
    results: list[Any] = []
    leave = threading.Event()

    def client() -> None:
        with urllib3.PoolManager(maxsize=1, retries=False, timeout=60) as pool:
            while not leave.is_set():
                reply = pool.request("POST", f"{url}/v1/score", body=body, headers=headers)
                results.append((reply.status, json.loads(reply.data)["raw_scores"][0]))

    with log.open("wb") as errors, subprocess.Popen(command, stderr=errors, env=os.environ) as process:
        try:
            deadline = time.monotonic() + 600
            while time.monotonic() < deadline:
                try:
                    if status(url, "/readyz") == 200:
                        break
                except urllib3.exceptions.HTTPError:
                    assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            else:
                pytest.fail(f"not ready: {log.read_text()}")
            assert urllib3.request("POST", f"{url}/v1/score", body=body, headers=V1_HEADERS).status == 401
            with ThreadPoolExecutor(16) as threads:
                clients = [threads.submit(client) for _ in range(16)]
                time.sleep(1)
                process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + 10
                while status(url, "/readyz") == 200:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                leave.set()
                for each in clients:
                    each.result()
            assert process.wait(300) == 0  # of which most is the end of the interpreter
        finally:
            process.kill()
    assert len(results) > 16
    assert {code for code, _ in results} == {200}
    assert all(score == pytest.approx(expected, abs=1e-5) for _, score in results)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert sum(line["status"] == 200 and line["path"] == "/v1/score" for line in lines) == len(results)
    assert "s3cret" not in log.read_text()
