"""Runs every alignment algorithm on the embedded world, several seeds each, and tabulates what the oracle says.

    python recipes/compare_algorithms.py --output outputs/comparison --jobs 2

Every run is a recipe with one of its configurations, in a process of its own, from the shipped generator; it trains on the
latent reward alone, and the oracle judges 144 held-out prompts before and after. The command can be killed and started
again: runs that are complete are kept. It writes `comparison.json`, `comparison.md` and `comparison.png` to the output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm.auto import tqdm


RECIPES = Path(__file__).parent
ENTRIES = {
    "DDPO, importance-sampled": ("ddpo", "ddpo_shapes"),
    "DDPO, score function": ("ddpo", "ddpo_shapes_sf"),
    "GRPO (UNet, DDIM)": ("grpo", "grpo_shapes_ddpm"),
    "Flow-GRPO, CPS": ("flow_grpo", "flow_grpo_shapes"),
    "Flow-GRPO, Flow-SDE": ("flow_grpo", "flow_grpo_shapes_flow_sde"),
    "Flow-GRPO, Dance-SDE": ("flow_grpo", "flow_grpo_shapes_dance_sde"),
    "MixGRPO (sliding window)": ("flow_grpo", "flow_grpo_shapes_mix_sliding"),
    "GRPO-Guard": ("flow_grpo", "flow_grpo_shapes_guard"),
    "Flow-GRPO, step-wise credit": ("flow_grpo", "flow_grpo_shapes_gain"),
    "DiffusionNFT": ("nft", "nft_shapes"),
    "ReFL": ("refl", "refl_shapes"),
    "DRaFT-K": ("refl", "refl_shapes_draft"),
    "DRTune": ("refl", "refl_shapes_drtune"),
    "Online DPO": ("online_dpo", "online_dpo_shapes"),
}
"""Name in the table: recipe and configuration."""

COSTS = ("seconds", "cpu_seconds", "peak_memory_mb", "reward_calls")


def run(recipe: str, config: str, seed: int, directory: Path, threads: int) -> None:
    """One run in a process of its own; its figures appear in `result.json` when it has ended well."""
    if (directory / "result.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), "--config", str(RECIPES / "configs" / f"{config}.yaml")]
    options = {"seed": seed, "output_dir": directory, "save_strategy": "no", "disable_tqdm": True}
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(directory / "log.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}; see {directory / 'log.txt'}")
    costs = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_memory_mb": usage.ru_maxrss / 1024}
    result = {**summary(directory), **costs, "seed": seed}
    (directory / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def summary(directory: Path) -> dict[str, Any]:
    """Figures of a run from the files that the trainer left."""
    history = [json.loads(line) for line in (directory / "evaluation_history.jsonl").read_text().splitlines()]
    log = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    calls = [line["reward_calls"] for line in log if "reward_calls" in line]
    return {
        "history": [{"step": record["step"], **record["metrics"]} for record in history],
        "seconds": next(line["train_runtime"] for line in log if "train_runtime" in line),
        "reward_calls": calls[-1],
        "hacking_alarms": sum(len(record["hacking"]) for record in history),
    }


def rows(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row of the table per algorithm: gains in points for each seed, and means of the costs."""
    table = []
    for name, runs in results.items():
        first, last = ([result["history"][place] for result in runs] for place in (0, -1))
        gains = [100 * (after["fit"] - before["fit"]) for before, after in zip(first, last, strict=True)]
        table.append(
            {
                "algorithm": name,
                "gains": [round(gain, 1) for gain in gains],
                "fit_before": mean(record["fit"] for record in first),
                "fit_after": mean(record["fit"] for record in last),
                "cleanness_before": mean(record["cleanness"] for record in first),
                "cleanness_after": mean(record["cleanness"] for record in last),
                **{key: mean(run[key] for run in runs) for key in COSTS},
                "hacking_alarms": sum(run["hacking_alarms"] for run in runs),
            }
        )
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table as it stands in the documentation."""
    lines = [
        "| algorithm | oracle fit | gain in points, per seed | cleanness | seconds (CPU) | peak MB | reward calls |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        gains = ", ".join(f"{gain:+.1f}" for gain in row["gains"])
        lines.append(
            f"| {row['algorithm']} | {row['fit_before']:.3f} → {row['fit_after']:.3f} | {gains} | "
            f"{row['cleanness_before']:.3f} → {row['cleanness_after']:.3f} | "
            f"{row['seconds']:.0f} ({row['cpu_seconds']:.0f}) | {row['peak_memory_mb']:.0f} | {row['reward_calls']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Oracle fit and cleanness over reward calls' share of each run, one panel per algorithm, one line per seed."""
    from matplotlib.figure import Figure

    columns = 5
    figure = Figure(figsize=(3 * columns, 2.6 * -(-len(results) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(results) // columns), columns, sharey=True, squeeze=False)
    for panel in axes.flat[len(results) :]:
        panel.set_axis_off()
    for panel, (name, runs) in zip(axes.flat, results.items(), strict=False):
        for result in runs:
            steps = [record["step"] for record in result["history"]]
            for metric, style, colour in (("fit", "o-", "tab:blue"), ("cleanness", "s:", "tab:green")):
                values = [record[metric] for record in result["history"]]
                panel.plot(steps, values, style, color=colour, markersize=3, linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    axes.flat[0].legend(["oracle fit", "oracle cleanness"], fontsize=7, loc="lower right")
    figure.supxlabel("optimizer step")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the alignment algorithms on the embedded world.")
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), help="directory of runs and table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run per algorithm and seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; they share the cores")
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), help="run these algorithms alone")
    arguments = parser.parse_args()
    names = arguments.only or list(ENTRIES)
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    places = {
        (name, seed): arguments.output / ENTRIES[name][1] / f"seed-{seed}"
        for seed in arguments.seeds
        for name in names
    }
    print(f"runs and table: {arguments.output}")
    with ThreadPoolExecutor(arguments.jobs) as pool, tqdm(total=len(places), desc="runs") as progress:
        futures = []
        for (name, seed), directory in places.items():
            futures.append(pool.submit(run, *ENTRIES[name], seed, directory, threads))
            futures[-1].add_done_callback(lambda _: progress.update())
        for future in futures:
            future.result()
    results = {
        name: [json.loads((places[name, seed] / "result.json").read_text()) for seed in arguments.seeds]
        for name in names
    }
    table = rows(results)
    report = {
        "made": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "jobs": arguments.jobs,
        "threads_per_job": threads,
        "table": table,
        "runs": results,
    }
    (arguments.output / "comparison.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "comparison.md").write_text(markdown(table), encoding="utf-8")
    draw(results, arguments.output / "comparison.png")
    print(markdown(table))


if __name__ == "__main__":
    main()
