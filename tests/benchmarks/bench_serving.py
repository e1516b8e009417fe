"""Rows per second through a scoring server against direct calls, at 1, 16, 32 and 64 clients; overhead and bytes per row.

    python tests/benchmarks/bench_serving.py

The embedded world's reward, in float32. The server runs in a process of its own, the clients are threads of this one, each
with a connection that stays open, and send one row after another as protocol version 1's client does. Server and clients
share the cores, so what is measured is the whole of it. Direct calls and every number of clients take turns, several
rounds of all of them: other programs on the machine disturb all alike, and ratios are of medians of one run. Core time, of
server and clients together, does not count what other programs took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import urllib3
from safetensors.torch import save

from dina_reward import LatentReward, RemoteReward
from dina_reward.shapes import load_pipeline, load_reward, sample_prompts


RESULTS = Path(__file__).parent / "results"
HEADERS = {"content-type": "application/octet-stream", "x-drm-protocol-version": "1"}
GROUP = 18
COUNTERS = ("dina_reward_batch_rows_sum", "dina_reward_batch_rows_count", "process_cpu_seconds_total")
BYTES_PER_ROW = {
    "SD3.5 at 512 x 512, float32, version 1": 4 * (16 * 64 * 64 + 333 * 4096 + 2048 + 1) + 8,
    "the same in version 2, 18 rows of a group per request": 4 * (16 * 64 * 64 + (333 * 4096 + 2048) // GROUP) + 16,
}


@contextlib.contextmanager
def server(*options: str) -> Iterator[Callable[[], str]]:
    """The command in a process of its own; gives a function that waits until it is ready and returns its address.

    Args:
        options: of the command; the embedded world's reward unless they say another.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dina_reward.cli", "serve", "--model-path", "shapes", f"--port={port}"]
    command += ["--drain-seconds=0", *options]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:

        def ready() -> str:
            while process.poll() is None:
                with contextlib.suppress(urllib3.exceptions.HTTPError):
                    if urllib3.request("GET", f"{url}/readyz", retries=False).status == 200:
                        return url
                time.sleep(0.5)
            raise RuntimeError(f"the server ended with code {process.returncode}")

        try:
            yield ready
        finally:
            process.terminate()


def rows_of(reward: LatentReward, count: int) -> tuple[torch.Tensor, list[str], list[bytes]]:
    """Latents in groups of 18 with one prompt each, and a body of version 1 for every one."""
    latents = torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    names = sample_prompts(-(-count // GROUP), "train", seed=0)
    prompts = [names[row // GROUP] for row in range(count)]
    bodies = []
    for row, prompt in enumerate(prompts):
        encoded, _ = reward.encode_prompts([prompt])
        assert encoded.pooled_prompt_embeds is not None
        tensors = {
            "latents": latents[row : row + 1].contiguous(),
            "prompt_embeds": encoded.prompt_embeds.contiguous(),
            "pooled_prompt_embeds": encoded.pooled_prompt_embeds.contiguous(),
            "u": torch.tensor([0.4]),
            "seeds": torch.tensor([row]),
        }
        bodies.append(save(tensors))
    return latents, prompts, bodies


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that it took, and seconds of a core that this process spent."""
    started, worked = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started, time.process_time() - worked


def figure(url: str, name: str) -> float:
    """Sum of a figure at /metrics."""
    text = urllib3.request("GET", f"{url}/metrics").data.decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)


def measure(rows: int, rounds: int, clients: list[int], max_batch_size: int) -> dict[str, Any]:
    """Median seconds of every way to score the rows."""
    with server(f"--max-batch-size={max_batch_size}") as ready:
        reward = load_reward(pipeline=load_pipeline())
        latents, prompts, bodies = rows_of(reward, rows)
        url = ready()
        pool = urllib3.PoolManager(maxsize=max(clients), retries=False)
        remote = RemoteReward(url, batch_size=max_batch_size)

        def post(body: bytes) -> float:
            reply = pool.request("POST", f"{url}/v1/score", body=body, headers=HEADERS)
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {reply.data!r}")
            return float(json.loads(reply.data)["raw_scores"][0])

        def direct(batch: int) -> torch.Tensor:
            return reward(latents, prompts, seed=list(range(rows)), noise_level=0.4, batch_size=batch)

        def through(count: int) -> list[float]:
            with ThreadPoolExecutor(count) as threads:
                return list(threads.map(post, bodies))

        ways: dict[str, Callable[[], Any]] = {
            "direct, 1 row per pass": lambda: direct(1),
            f"direct, {max_batch_size} rows per pass": lambda: direct(max_batch_size),
            "RemoteReward": lambda: remote(latents, prompts, seed=list(range(rows)), noise_level=0.4),
            **{f"version 1, {count} clients": (lambda count=count: through(count)) for count in clients},
        }
        expected = direct(1)
        error = float((torch.tensor(through(max(clients))) - expected).abs().max())
        for work in ways.values():
            work()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cores: dict[str, list[float]] = {name: [] for name in ways}
        batches: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, work in ways.items():
                before = [figure(url, counter) for counter in COUNTERS]
                taken, worked = timed(work)
                after = [figure(url, counter) for counter in COUNTERS]
                seconds[name].append(taken)
                cores[name].append(worked + (0 if name.startswith("direct") else after[2] - before[2]))
                if after[1] > before[1]:
                    batches[name].append((after[0] - before[0]) / (after[1] - before[1]))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures = summary(rows, medians, batches, clients)
    figures["core_milliseconds_per_row"] = {name: 1000 * statistics.median(v) / rows for name, v in cores.items()}
    return {**figures, "largest_difference_to_direct": error, "load_average_after": os.getloadavg()[0]}


def summary(
    rows: int, seconds: dict[str, float], batches: dict[str, list[float]], clients: list[int]
) -> dict[str, Any]:
    """Rates and ratios of one run."""
    alone, together = list(seconds)[:2]
    one = f"version 1, {min(clients)} clients"
    return {
        "rows_per_second": {name: rows / value for name, value in seconds.items()},
        "rows_per_batch": {name: statistics.mean(values) for name, values in batches.items() if values},
        "of_direct_rows_per_second": {name: seconds[together] / value for name, value in seconds.items()},
        "overhead_milliseconds_per_row_of_one_client": 1000 * (seconds[one] - seconds[alone]) / rows,
        "gain_by_clients": {str(n): seconds[one] / seconds[f"version 1, {n} clients"] for n in clients},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=72)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 32, 64])
    parser.add_argument("--max-batch-size", type=int, default=8)
    arguments = parser.parse_args()
    machine = {"device": f"{platform.machine()} cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    runs = []
    for _ in range(arguments.runs):
        before = {"load_average_before": os.getloadavg()[0]}
        runs.append(before | measure(arguments.rows, arguments.rounds, arguments.clients, arguments.max_batch_size))
    report = {**vars(arguments), **machine, "bytes_per_row": BYTES_PER_ROW, "runs": runs}
    print(json.dumps(report, indent=2))
    RESULTS.mkdir(exist_ok=True)
    name = f"serving-{platform.machine().replace('_', '-')}-cpu.json"
    (RESULTS / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
