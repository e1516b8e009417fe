"""Who should make batches on Ray Serve: this package's batcher inside of each replica, or ``serve.batch``.

    pip install "ray[serve]" && python -m tests.benchmarks.bench_ray

One replica of each on the CPU, the same application and the embedded world's reward in both; in the second, requests wait
in ``serve.batch`` and are grouped by shape afterwards. Clients are threads of this process and send one row after another,
as protocol version 1's client does. Both take turns, several rounds; ratios are of medians of one run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3

from dina_reward.serving import ray as on_ray
from dina_reward.shapes import load_pipeline, load_reward, weights_dir
from tests.benchmarks.bench_serving import HEADERS, RESULTS, figure, rows_of


MODEL = {"model_path": str(weights_dir("flow-reward")), "num_gpus": 0, "num_cpus": 0.5}
WAIT_MS = 10.0


def with_serve_batch(loading: Any, config: Any) -> Any:
    """The application, with ``serve.batch`` in place of the package's batcher; runs in the replica."""
    from ray import serve

    from dina_reward.serving import service
    from dina_reward.serving.app import create_app
    from dina_reward.serving.batcher import Answer, MicroBatcher
    from dina_reward.serving.loading import load_served_reward

    class ServeBatcher(MicroBatcher):
        @serve.batch(max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.max_wait_ms / 1000)
        async def together(self, requests: list[Any]) -> list[Any]:
            groups: dict[Any, list[int]] = {}
            for place, request in enumerate(requests):
                groups.setdefault(request.key, []).append(place)
            answers: list[Any] = [None] * len(requests)
            for places in groups.values():
                started = time.monotonic()
                chosen = [requests[place] for place in places]
                loop = asyncio.get_running_loop()
                scores = await loop.run_in_executor(self._executor, self._score, chosen)
                seconds, rows = time.monotonic() - started, sum(request.rows for request in chosen)
                self._on_batch(len(chosen), rows, seconds)
                for place, part in zip(places, scores, strict=True):
                    answers[place] = Answer(part, 0.0, seconds, rows)
            return answers

        async def submit(self, request: Any, deadline: float) -> Any:
            return await self.together(request)

    service.MicroBatcher = ServeBatcher  # type: ignore[misc]
    return create_app(lambda: load_served_reward(**loading), config)


def deploy(max_batch_size: int) -> str:
    """Starts both; their common address."""
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": 8643})
    arguments = {**MODEL, "max_batch_size": max_batch_size, "max_wait_ms": WAIT_MS}
    serve.run(on_ray.build(arguments), name="ours", route_prefix="/ours")
    own, on_ray._application = on_ray._application, with_serve_batch
    serve.run(on_ray.build(arguments), name="rays", route_prefix="/rays")
    on_ray._application = own
    return "http://127.0.0.1:8643"


def measure(url: str, rows: int, rounds: int, clients: list[int]) -> dict[str, Any]:
    reward = load_reward(pipeline=load_pipeline())
    latents, prompts, bodies = rows_of(reward, rows)
    expected = reward(latents, prompts, seed=list(range(rows)), noise_level=0.4).tolist()
    pool = urllib3.PoolManager(maxsize=max(clients), retries=False)

    def through(name: str, count: int) -> float:
        def post(body: bytes) -> float:
            reply = pool.request("POST", f"{url}/{name}/v1/score", body=body, headers=HEADERS)
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {reply.data!r}")
            return float(reply.json()["raw_scores"][0])

        started = time.perf_counter()
        with ThreadPoolExecutor(count) as threads:
            scores = list(threads.map(post, bodies))
        seconds = time.perf_counter() - started
        worst = max(abs(score - right) / abs(right) for score, right in zip(scores, expected, strict=True))
        if worst > 1e-6:
            raise RuntimeError(f"{name}: scores differ by {worst:.1e} of their size")
        return seconds

    names = {"ours": "the package's batcher", "rays": "serve.batch"}
    rates: dict[str, dict[str, Any]] = {}
    for count in clients:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        batches: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds + 1):
            for name in names:
                before = [figure(f"{url}/{name}", f"dina_reward_batch_rows_{part}") for part in ("sum", "count")]
                taken = through(name, count)
                after = [figure(f"{url}/{name}", f"dina_reward_batch_rows_{part}") for part in ("sum", "count")]
                if turn:  # the first is for warming up
                    seconds[name].append(taken)
                    batches[name].append((after[0] - before[0]) / (after[1] - before[1]))
        found = {
            label: {
                "rows_per_second": rows / statistics.median(seconds[name]),
                "rows_per_batch": statistics.mean(batches[name]),
            }
            for name, label in names.items()
        }
        ratio = statistics.median(seconds["rays"]) / statistics.median(seconds["ours"])
        rates[f"{count} clients"] = {**found, "ours_over_rays": ratio}
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--max-batch-size", type=int, default=8)
    arguments = parser.parse_args()
    machine = {
        "device": f"{platform.machine()} cpu",
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
    }
    import ray
    from ray import serve

    try:
        figures = measure(deploy(arguments.max_batch_size), arguments.rows, arguments.rounds, arguments.clients)
    finally:
        serve.shutdown()
        ray.shutdown()
    report = {**vars(arguments), "ray": ray.__version__, **machine, **figures}
    print(json.dumps(report, indent=2))
    RESULTS.mkdir(exist_ok=True)
    name = f"ray-{platform.machine().replace('_', '-')}-cpu.json"
    (RESULTS / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
