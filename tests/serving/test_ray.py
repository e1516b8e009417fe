"""The application on Ray Serve; two replicas on the CPU where ``ray[serve]`` is installed (DINA_REWARD_TEST_RAY=1)."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from dina_reward import LatentReward, RemoteReward
from dina_reward.serving import ServingConfig, create_app, load_served_reward
from dina_reward.serving import ray as on_ray
from dina_reward.shapes import weights_dir
from tests.serving.raw import post, read_v1, v1_body
from tests.serving.test_server import free_port


class Recorded:
    """Stands for ``ray.serve`` and keeps what it is asked for."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.application: Any = None

    def ingress(self, application: Any) -> Any:
        self.application = application
        return lambda cls: cls

    def deployment(self, **options: Any) -> Any:
        self.options = options
        return lambda cls: types.SimpleNamespace(bind=lambda: self)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    stand_in = Recorded()
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(serve=stand_in))
    return stand_in


def test_arguments_come_as_texts_and_go_where_they_belong(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    on_ray.build({"model_path": "m", "num_replicas": "2", "num_gpus": "0", "max_batch_size": "16", "max_wait_ms": "5"})
    assert recorded.options["num_replicas"] == 2
    assert recorded.options["ray_actor_options"] == {"num_gpus": 0, "num_cpus": 1}
    assert recorded.options["max_ongoing_requests"] >= 2 * 16
    assert inspect.isfunction(recorded.application)  # what Ray asks for
    made: list[Any] = []
    monkeypatch.setattr(on_ray, "_application", lambda *arguments: made.extend(arguments))
    recorded.application()
    assert made == [{"model_path": "m", "device": "cpu"}, ServingConfig(max_batch_size=16, max_wait_ms=5.0)]


def test_the_number_of_replicas_may_follow_the_load(recorded: Recorded) -> None:
    on_ray.build({"model_path": "m", "num_replicas": 1, "max_replicas": 4})
    assert recorded.options["autoscaling_config"] == {
        "min_replicas": 1,
        "max_replicas": 4,
        "target_ongoing_requests": 16,
    }
    assert "num_replicas" not in recorded.options


@pytest.mark.parametrize("arguments", [{}, {"model_path": "m", "replicas": 2}, {"model_path": "m", "token": "t"}])
def test_unknown_arguments_are_refused(recorded: Recorded, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="takes model_path and .*num_replicas"):
        on_ray.build(arguments)


def test_a_replica_is_healthy_once_its_reward_is_loaded(reward: LatentReward) -> None:
    async def checked(load: Any) -> None:
        replica = on_ray._Replica()
        replica.app = create_app(load)
        async with replica.app.state.service.running():
            await replica.check_health()
            assert replica.app.state.service.state == "ready"

    asyncio.run(checked(lambda: reward))
    with pytest.raises(RuntimeError, match="cannot be loaded: there is no device 'npu:3'"):
        asyncio.run(checked(partial(load_served_reward, str(weights_dir("flow-reward")), device="npu:3")))


@pytest.mark.timeout(900)  # a busy machine takes minutes to start Ray and two replicas
@pytest.mark.skipif("DINA_REWARD_TEST_RAY" not in os.environ, reason="needs ray[serve], and DINA_REWARD_TEST_RAY=1")
def test_two_replicas_score_as_the_reward_itself(reward: LatentReward) -> None:
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    try:
        arguments = {
            "model_path": str(weights_dir("flow-reward")),
            "num_replicas": 2,
            "num_gpus": 0,
            "num_cpus": 0.5,
        }
        port = free_port()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(on_ray.build(arguments), route_prefix="/")
        url = f"http://127.0.0.1:{port}"
        latents = torch.randn(24, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        prompts = ["a large red circle on a white background"] * 24
        remote = RemoteReward(url, batch_size=8)
        expected = reward(latents, prompts, seed=0, batch_size=8)
        assert torch.equal(remote(latents, prompts, seed=0), expected)  # equal batches, equal bits
        bodies = [v1_body(reward, latent, prompts[0], seed=row) for row, latent in enumerate(latents)]
        with ThreadPoolExecutor(24) as clients:
            replies = list(clients.map(partial(post, url), bodies))
        scores = torch.tensor([read_v1(reply.status, reply.headers, reply.data) for reply in replies])
        expected = reward(latents, prompts, seed=list(range(24)), noise_level=0.4)
        torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)
        (status,) = serve.status().applications["default"].deployments.values()
        assert status.replica_states == {"RUNNING": 2}
    finally:
        serve.shutdown()
        ray.shutdown()
