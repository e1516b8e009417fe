"""A reward in service, in a thread of the test's own process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import urllib3
import uvicorn

from dina_reward import LatentReward
from dina_reward.serving import ServingConfig, create_app
from dina_reward.serving.server import DrainingServer, protocol_class
from dina_reward.shapes import load_pipeline, load_reward


PROMPTS = ["a large red circle on a white background", "a small blue square on a black background"]


class Running:
    """A server on a free port of this machine."""

    def __init__(self, reward: Any, config: ServingConfig) -> None:
        self.app = create_app(reward, config)
        self.service = self.app.state.service
        settings = uvicorn.Config(
            self.app,
            host="127.0.0.1",
            port=0,
            http=protocol_class(config.header_timeout),
            ws="none",
            log_config=None,
            timeout_graceful_shutdown=20,
        )
        self.server = DrainingServer(settings, self.service)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self) -> None:
        self.thread.start()
        deadline = time.monotonic() + 60
        while not (self.server.started and self.service.state != "loading") and time.monotonic() < deadline:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def metric(self, name: str, **labels: str) -> float:
        """A figure at /metrics."""
        text = urllib3.request("GET", f"{self.url}/metrics").data.decode()
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        lines = [line for line in text.splitlines() if line.partition(" ")[0].partition("{")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in wanted))


@contextlib.contextmanager
def running(reward: Any, **settings: Any) -> Iterator[Running]:
    """A server that runs inside of the context."""
    server = Running(reward, ServingConfig(**settings))
    server.start()
    try:
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join(30)


@pytest.fixture(scope="session")
def reward() -> LatentReward:
    """The embedded world's reward, with text encoders."""
    return load_reward(pipeline=load_pipeline())


@pytest.fixture(scope="session")
def server(reward: LatentReward) -> Iterator[Running]:
    """A server of it; what tests do to it leaves it as it is."""
    with running(reward) as started:
        yield started


@pytest.fixture
def latents() -> torch.Tensor:
    """Six of the embedded world's size."""
    return torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def prompts() -> list[str]:
    """Two groups of three."""
    return [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
