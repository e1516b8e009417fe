"""The application on Ray Serve; two replicas on the CPU where ``ray[serve]`` is installed (DINA_REWARD_TEST_RAY=1)."""

from __future__ import annotations

import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dina_reward import LatentReward, RemoteReward
from dina_reward.serving import ServingConfig
from dina_reward.serving import ray as on_ray
from dina_reward.shapes import weights_dir


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


def test_arguments_come_as_texts_and_go_where_they_belong(recorded: Recorded) -> None:
    on_ray.build({"model_path": "m", "num_replicas": "2", "num_gpus": "0", "max_batch_size": "16", "max_wait_ms": "5"})
    assert recorded.options["num_replicas"] == 2
    assert recorded.options["ray_actor_options"] == {"num_gpus": 0, "num_cpus": 1}
    assert recorded.options["max_ongoing_requests"] >= 2 * 16
    loading, config = recorded.application.args
    assert loading == {"model_path": "m", "device": "cpu"}
    assert config == ServingConfig(max_batch_size=16, max_wait_ms=5.0)


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


@pytest.mark.skipif("DINA_REWARD_TEST_RAY" not in os.environ, reason="needs ray[serve], and DINA_REWARD_TEST_RAY=1")
def test_two_replicas_score_as_the_reward_itself(reward: LatentReward) -> None:
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        arguments = {
            "model_path": str(weights_dir("flow-reward")),
            "num_replicas": 2,
            "num_gpus": 0,
            "num_cpus": 0.5,
        }
        serve.start(http_options={"host": "127.0.0.1", "port": 8642})
        serve.run(on_ray.build(arguments), route_prefix="/")
        latents = torch.randn(24, 8, 8, 8, generator=torch.Generator().manual_seed(0))
        remote = RemoteReward("http://127.0.0.1:8642", batch_size=2)
        scores = remote(latents, "a large red circle on a white background", seed=0)
        expected = reward(latents, "a large red circle on a white background", seed=0)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
        with ThreadPoolExecutor(8) as clients:
            again = list(clients.map(lambda _: remote(latents[:2], "a small blue square", seed=0), range(16)))
        assert all(torch.allclose(each, again[0], atol=1e-5) for each in again)
    finally:
        serve.shutdown()
        ray.shutdown()
