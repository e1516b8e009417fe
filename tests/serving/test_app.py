"""Protocol version 1 as its client speaks it, and what the application says to everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import urllib3
from safetensors.torch import save

from dina_reward import LatentReward
from dina_reward.serving import ServingConfig, create_app
from tests.serving.conftest import PROMPTS, Running, running
from tests.serving.raw import V1_HEADERS, App, post, read_v1, v1_body


V2_HEADERS = {**V1_HEADERS, "x-drm-protocol-version": "2"}


@contextlib.asynccontextmanager
async def started(reward: Any, **settings: Any) -> AsyncIterator[App]:
    """An application that is ready, in the running loop."""
    app = create_app(reward, ServingConfig(**settings))
    async with app.state.service.running():
        while app.state.service.state == "loading":
            await asyncio.sleep(0.005)
        yield App(app)


def in_app(reward: Any, work: Callable[[App], Awaitable[Any]], **settings: Any) -> Any:
    async def main() -> Any:
        async with started(reward, **settings) as app:
            return await work(app)

    return asyncio.run(main())


def test_a_group_of_18_concurrent_requests_equals_direct_scores(server: Running, reward: LatentReward) -> None:
    latents = torch.randn(18, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    bodies = [v1_body(reward, latent, PROMPTS[0], u=0.3, seed=row) for row, latent in enumerate(latents)]
    misses = server.metric("dina_reward_prompt_cache_misses_total")
    with ThreadPoolExecutor(18) as clients:
        replies = list(clients.map(lambda body: post(server.url, body), bodies))
    scores = [read_v1(reply.status, reply.headers, reply.data) for reply in replies]
    direct = reward(latents, PROMPTS[0], noise_level=0.3, seed=list(range(18)))
    torch.testing.assert_close(torch.tensor(scores), direct, rtol=0, atol=1e-5)
    assert server.metric("dina_reward_prompt_cache_misses_total") - misses <= 1


def test_one_row_is_scored_to_the_last_bit(server: Running, reward: LatentReward, latents: torch.Tensor) -> None:
    reply = post(server.url, v1_body(reward, latents[0], PROMPTS[1], u=0.7, seed=11))
    score = read_v1(reply.status, reply.headers, reply.data)
    assert score == float(reward(latents[:1], PROMPTS[1], noise_level=0.7, seed=[11]))
    assert json.loads(reply.data)["server_version"]


def test_without_seeds_noise_is_random(server: Running, reward: LatentReward, latents: torch.Tensor) -> None:
    body = v1_body(reward, latents[0], PROMPTS[0], seed=None)
    scores = {read_v1(r.status, r.headers, r.data) for r in (post(server.url, body) for _ in range(3))}
    assert len(scores) == 3


def test_several_rows_with_one_prompt_and_levels_of_their_own(
    server: Running, reward: LatentReward, latents: torch.Tensor
) -> None:
    encoded, _ = reward.encode_prompts(PROMPTS[:1])
    body = save(
        {
            "latents": latents,
            "prompt_embeds": encoded.prompt_embeds.contiguous(),
            "pooled_prompt_embeds": encoded.pooled_prompt_embeds.contiguous(),
            "u": torch.linspace(0.1, 0.6, 6),
            "seeds": torch.arange(6),
        }
    )
    reply = post(server.url, body)
    assert reply.status == 200, reply.data
    scores = json.loads(reply.data)["raw_scores"]
    for row, score in enumerate(scores):
        alone = reward(latents[row : row + 1], PROMPTS[0], noise_level=0.1 + 0.1 * row, seed=[row])
        assert score == pytest.approx(float(alone), abs=1e-5)


def _v1(reward: LatentReward, **changes: Any) -> dict[str, torch.Tensor]:
    encoded, _ = reward.encode_prompts(PROMPTS[:1])
    tensors = {
        "latents": torch.zeros(1, 8, 8, 8),
        "prompt_embeds": encoded.prompt_embeds,
        "pooled_prompt_embeds": encoded.pooled_prompt_embeds,
        "u": torch.tensor([0.4]),
        "seeds": torch.tensor([0]),
        **changes,
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank 3": ({"latents": torch.zeros(8, 8, 8)}, "wrong_rows"),
    "17 channels": ({"latents": torch.zeros(1, 17, 8, 8)}, "invalid_latents"),
    "odd size": ({"latents": torch.zeros(1, 8, 7, 8)}, "invalid_latents"),
    "beyond the position table": ({"latents": torch.zeros(1, 8, 2, 4000)}, "invalid_latents"),
    "NaN": ({"latents": torch.full((1, 8, 8, 8), math.nan)}, "invalid_latents"),
    "integers": ({"latents": torch.zeros(1, 8, 8, 8, dtype=torch.int64)}, "wrong_dtype"),
    "no rows": ({"latents": torch.zeros(0, 8, 8, 8)}, "empty_tensor"),
    "no latents": ({"latents": None}, "missing_tensors"),
    "no levels": ({"u": None}, "missing_tensors"),
    "no pooled": ({"pooled_prompt_embeds": None}, "invalid_embeddings"),
    "narrow embeddings": ({"prompt_embeds": torch.zeros(1, 6, 5)}, "invalid_embeddings"),
    "embeddings of infinity": ({"pooled_prompt_embeds": torch.full((1, 64), math.inf)}, "not_finite"),
    "three prompts": (
        {"prompt_embeds": torch.zeros(3, 6, 64), "pooled_prompt_embeds": torch.zeros(3, 64)},
        "wrong_rows",
    ),
    "level above 1": ({"u": torch.tensor([1.5])}, "invalid_levels"),
    "level of NaN": ({"u": torch.tensor([math.nan])}, "invalid_levels"),
    "two levels": ({"u": torch.tensor([0.1, 0.2])}, "wrong_rows"),
    "levels of rank 2": ({"u": torch.zeros(1, 1)}, "wrong_rank"),
    "float seeds": ({"seeds": torch.tensor([0.0])}, "wrong_dtype"),
    "another tensor": ({"image": torch.zeros(1)}, "unknown_tensors"),
}


def test_what_cannot_be_scored_is_422_and_says_why(reward: LatentReward) -> None:
    sizes = _v1(reward)
    width, pooled = sizes["prompt_embeds"].shape[-1], sizes["pooled_prompt_embeds"].shape[-1]
    fitting = {
        "prompt_embeds": torch.zeros(3, 6, width),
        "pooled_prompt_embeds": torch.zeros(3, pooled),
    }
    infinite = {"pooled_prompt_embeds": torch.full((1, pooled), math.inf)}
    wrong = {**WRONG, "three prompts": (fitting, "wrong_rows"), "embeddings of infinity": (infinite, "not_finite")}

    async def work(app: App) -> None:
        for name, (changes, code) in wrong.items():
            status, headers, body = await app(chunks=[save(_v1(reward, **changes))])
            fault = json.loads(body)
            assert (status, fault["error"]) == (422, code), (name, fault)
            assert all(fault[key] for key in ("given", "expected", "do")), name
            assert headers["content-type"] == "application/json"
        status, _, body = await app(chunks=[save(_v1(reward))])
        assert status == 200, body

    in_app(reward, work)


HEADERS: list[tuple[dict[str, str], int, str]] = [
    ({"x-drm-protocol-version": "2"}, 400, "wrong_protocol_version"),
    ({"x-drm-protocol-version": ""}, 400, "wrong_protocol_version"),
    ({"content-type": "application/json"}, 415, "wrong_content_type"),
    ({"content-encoding": "gzip"}, 415, "wrong_content_encoding"),
    ({"x-request-timeout": "soon"}, 400, "invalid_timeout"),
    ({"x-request-timeout": "-1"}, 400, "invalid_timeout"),
]


def test_wrong_headers_and_routes(reward: LatentReward) -> None:
    async def work(app: App) -> None:
        for changes, expected, code in HEADERS:
            status, _, body = await app(chunks=[save(_v1(reward))], headers={**V1_HEADERS, **changes})
            assert (status, json.loads(body)["error"]) == (expected, code)
        for path, method, expected in (("/", "GET", 404), ("/v1/score", "GET", 405), ("/v1/info", "POST", 405)):
            status, _, body = await app(path=path, method=method)
            assert (status, json.loads(body)["error"]) == (expected, "no_such_route")

    in_app(reward, work)


def test_the_token_is_asked_for(reward: LatentReward, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(
        "dina_reward.serving.app.hmac.compare_digest", lambda a, b: (compared.append((a, b)), a == b)[1]
    )

    async def work(app: App) -> None:
        for given in (None, "Bearer wrong", "Basic s3cret", "Bearer", "Bearer s3cret2"):
            headers = {**V1_HEADERS, **({} if given is None else {"authorization": given})}
            for path, method in (("/v1/score", "POST"), ("/v2/score", "POST"), ("/v1/info", "GET")):
                status, answer, body = await app(path, headers=headers, method=method)
                assert (status, json.loads(body)["error"]) == (401, "not_authorised")
                assert answer["www-authenticate"] == "Bearer"
                assert "s3cret" not in body.decode()
        headers = {**V1_HEADERS, "authorization": "Bearer s3cret"}
        assert (await app(chunks=[save(_v1(reward))], headers=headers))[0] == 200
        assert len(compared) == 16  # every request was compared, whatever it brought
        for path in ("/livez", "/readyz", "/healthz", "/metrics"):
            assert (await app(path, headers={}, method="GET"))[0] == 200

    in_app(reward, work, token="s3cret")


def test_before_it_is_loaded_it_is_alive_and_not_ready(reward: LatentReward) -> None:
    release = threading.Event()

    def load() -> LatentReward:
        release.wait(30)
        return reward

    async def main() -> None:
        app = create_app(load)
        call = App(app)
        async with app.state.service.running():
            assert (await call("/livez", method="GET"))[0] == 200
            for path in ("/readyz", "/healthz"):
                status, _, body = await call(path, method="GET")
                assert (status, json.loads(body)) == (503, {"status": "loading"})
            status, headers, body = await call(chunks=[save(_v1(reward))])
            assert (status, json.loads(body)["error"], headers["retry-after"]) == (503, "not_ready", "2")
            release.set()
            while app.state.service.state == "loading":
                await asyncio.sleep(0.005)
            assert (await call("/readyz", method="GET"))[0] == 200
            app.state.service.drain()
            status, headers, body = await call("/readyz", method="GET")
            assert (status, json.loads(body), headers["connection"]) == (503, {"status": "draining"}, "close")
            # What still comes while balancers turn away is scored.
            assert (await call(chunks=[save(_v1(reward))]))[0] == 200

    asyncio.run(main())


def test_a_reward_that_cannot_be_loaded_is_said(reward: LatentReward) -> None:
    def load() -> LatentReward:
        raise ValueError("no such checkpoint")

    async def work(app: App) -> None:
        assert (await app("/livez", method="GET"))[0] == 200
        assert json.loads((await app("/readyz", method="GET"))[2]) == {"status": "failed"}
        assert (await app(chunks=[save(_v1(reward))]))[0] == 503

    in_app(load, work)


def test_ids_and_the_log(reward: LatentReward, caplog: pytest.LogCaptureFixture) -> None:
    async def work(app: App) -> None:
        headers = {**V1_HEADERS, "x-request-id": "abc-1"}
        _, answer, _ = await app(chunks=[save(_v1(reward))], headers=headers)
        assert answer["x-request-id"] == "abc-1"
        _, answer, _ = await app(headers={"x-request-id": "a b\n" + 99 * "x"})
        assert len(answer["x-request-id"]) == 32

    with caplog.at_level(logging.INFO, "dina_reward.serving.access_log"):
        in_app(reward, work, access_log="all")
    scored, refused = (json.loads(record.message) for record in caplog.records if "access_log" in record.name)
    assert (scored["id"], scored["status"], scored["rows"], scored["batch_rows"]) == ("abc-1", 200, 1, 1)
    assert scored["path"] == "/v1/score"
    assert scored["ms"] >= scored["score_ms"] > 0
    assert scored["bytes"] == sum(t.numel() * t.element_size() for t in _v1(reward).values())
    assert (refused["status"], refused["error"]) == (415, "wrong_content_type")
    assert "latents" not in str(scored)


def test_only_failures_are_logged_by_default(reward: LatentReward, caplog: pytest.LogCaptureFixture) -> None:
    async def work(app: App) -> None:
        await app(chunks=[save(_v1(reward))])
        await app("/readyz", method="GET")
        await app("/nowhere", method="GET")

    with caplog.at_level(logging.INFO, "dina_reward.serving.access_log"):
        in_app(reward, work)
    assert [json.loads(r.message)["path"] for r in caplog.records if "access_log" in r.name] == ["/nowhere"]


def test_metrics_add_up(reward: LatentReward) -> None:
    body, refused = save(_v1(reward)), save(_v1(reward, u=torch.tensor([2.0])))
    with running(reward) as server:
        with ThreadPoolExecutor(8) as clients:
            statuses = list(clients.map(lambda each: post(server.url, each).status, [body] * 12 + [refused] * 3))
        assert sorted(statuses) == [200] * 12 + [422] * 3
        assert server.metric("dina_reward_rows_scored_total") == 12
        assert server.metric("dina_reward_batch_rows_sum") == 12
        assert server.metric("dina_reward_requests_total", path="/v1/score", status="200") == 12
        assert server.metric("dina_reward_requests_total", path="/v1/score", status="422") == 3
        assert server.metric("dina_reward_rejected_total", reason="invalid_levels") == 3
        assert server.metric("dina_reward_prompt_cache_misses_total") == 1
        assert server.metric("dina_reward_queue_rows") == 0
        assert server.metric("dina_reward_held_bytes") == 0
        assert server.metric("dina_reward_model_info", family="sd3") == 1
        assert server.metric("process_cpu_seconds_total") > 0


def test_an_unforeseen_error_is_500_and_the_server_goes_on(
    reward: LatentReward, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(app: App) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("dina_reward.serving.service.check_tensors", lambda *_: 1 / 0)
            status, headers, body = await app(chunks=[save(_v1(reward))])
        assert (status, json.loads(body)["error"]) == (500, "internal")
        assert headers["x-request-id"] in json.loads(body)["do"]
        with monkeypatch.context() as patched:
            patched.setattr(LatentReward, "score_noisy", lambda *_, **__: 1 / 0)
            status, headers, body = await app(chunks=[save(_v1(reward))])
        assert (status, json.loads(body)["error"]) == (503, "scoring_failed")
        assert "ZeroDivisionError" in json.loads(body)["given"]
        assert (await app(chunks=[save(_v1(reward))]))[0] == 200

    in_app(reward, work)


def test_a_client_that_goes_is_not_scored(reward: LatentReward, server: Running) -> None:
    body = save(_v1(reward))
    release = threading.Event()
    calls: list[int] = []
    scorer = server.service._scorer
    assert scorer is not None

    def slow(requests: Any) -> Any:
        calls.append(len(requests))
        release.wait(30)
        return scorer(requests)

    server.service._score, original = slow, server.service._score
    server.service.batcher._score = slow
    try:
        with ThreadPoolExecutor(2) as clients:
            first = clients.submit(post, server.url, body)
            while not calls:
                time.sleep(0.01)
            with pytest.raises(urllib3.exceptions.TimeoutError):
                urllib3.request(
                    "POST", f"{server.url}/v1/score", body=body, headers=V1_HEADERS, retries=False, timeout=0.3
                )
            while server.service.admission.rows > 1:
                time.sleep(0.01)
            release.set()
            assert first.result().status == 200
    finally:
        server.service._score = original
        server.service.batcher._score = original
    assert calls == [1]
