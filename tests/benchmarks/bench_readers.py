"""Opening a large preference dataset: seconds and memory to index it, and the cost of one record without its images.

    python tests/benchmarks/bench_readers.py

Makes synthetic records like those of HPDv3 (in JSON with "null" in place of some confidences), and opens each file in a
process of its own with a confidence filter and eight pairs per prompt. Wall time counts what else the machine does; the
processor's time does not. Images do not exist: names, labels and filters are measured, decoding is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"
READS = 2000


def record(number: int) -> dict[str, Any]:
    choices = random.Random(number)
    prompt = f"{number // 10}: a wide photograph of a harbour at dusk, fishing boats, soft light, 35 mm, very detailed"
    return {
        "prompt": prompt,
        "path1": f"images/{choices.getrandbits(128):032x}.jpg",
        "path2": f"images/{choices.getrandbits(128):032x}.jpg",
        "model1": choices.choice(["flux", "kolors", "sd3", "hunyuan"]),
        "model2": choices.choice(["sdxl", "sd2", "dalle", "real"]),
        "confidence": choices.choice([round(choices.uniform(0.8, 1), 4), None, "null"]),
        "choice_dist": choices.choice([[choices.randint(5, 19), choices.randint(0, 4)], None]),
    }


def write(path: Path, records: int) -> None:
    """Writes the file; parquet has a null for the word "null"."""
    if path.suffix == ".json":
        with path.open("w", encoding="utf-8") as file:
            for number in range(records):
                file.write(("[" if number == 0 else ",\n") + json.dumps(record(number)))
            file.write("]")
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = {name: pa.string() for name in ("prompt", "path1", "path2", "model1", "model2")}
    schema = pa.schema({**fields, "confidence": pa.float64(), "choice_dist": pa.list_(pa.int64())})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, records, 50_000):
            rows = [record(number) for number in range(start, min(start + 50_000, records))]
            plain = [{**row, "confidence": None if row["confidence"] == "null" else row["confidence"]} for row in rows]
            writer.write_table(pa.Table.from_pylist(plain, schema))


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(path: Path) -> dict[str, Any]:
    """Opens the file; memory is sampled every 10 ms, its growth counted from before."""
    import datasets  # noqa: F401  Imported here so that its own memory is not counted.

    from dina_reward.data import read_preferences

    before, peak, done = resident_mb(), [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident_mb())

    sampler = threading.Thread(target=sample)
    sampler.start()
    started, cpu = time.perf_counter(), time.process_time()
    reader = read_preferences(path, min_confidence=0.9, max_pairs_per_prompt=8)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    done.set()
    sampler.join()
    chosen = random.Random(0).sample(range(len(reader)), min(READS, len(reader)))
    started = time.process_time()
    for index in chosen:
        reader.names(index)
    return {
        "megabytes_on_disk": path.stat().st_size / 2**20,
        "pairs": len(reader),
        "left_out": dict(reader.report.dropped),
        "seconds": seconds,
        "processor_seconds": cpu,
        "memory_growth_mb": resident_mb() - before,
        "peak_memory_growth_mb": max(peak[0], resident_mb()) - before,
        "microseconds_per_pair_of_names": (time.process_time() - started) / len(chosen) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000, help="rows of the dataset")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file is not None:
        print(json.dumps(measure(arguments.file)))
        return
    report: dict[str, Any] = {"records": arguments.records, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as directory:
        for suffix in ("parquet", "json"):
            path = Path(directory, f"train.{suffix}")
            write(path, arguments.records)
            report["load_average_before"] = os.getloadavg()[0]
            environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(directory, "cache"))}
            command = [sys.executable, __file__, "--file", str(path)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            report[suffix] = {"load_average_before": report.pop("load_average_before")}
            report[suffix] |= json.loads(output.splitlines()[-1])
            path.unlink()
    print(json.dumps(report, indent=2))
    RESULTS.mkdir(exist_ok=True)
    name = f"readers-{platform.machine().replace('_', '-')}-cpu.json"
    (RESULTS / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
