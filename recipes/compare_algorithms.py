"""Runs every alignment algorithm on the embedded world at equal numbers of denoiser calls, and says which one to take.

    python recipes/compare_algorithms.py --output outputs/comparison --jobs 2

Every run is a recipe with one of its configurations, in a process of its own, from the shipped generator; it trains on the
latent reward alone until the calls are spent, and the oracle judges 144 held-out prompts at fixed marks. A null run, trained
on noise, shows what changes without a reward. The command can be killed and started again: runs that are complete are kept.
It writes `comparison.json`, `comparison.md` and two figures, `comparison.png` and `comparison_runs.png`, to the output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev, variance
from typing import Any

import numpy as np

from dina_reward.checkpoints.kept_results import identity, read_result, write_result, write_whole
from dina_reward.checkpoints.locking import sole_owner
from dina_reward.checks.children import in_parallel, run_child
from dina_reward.recipes.arguments import faults_in_one_line


RECIPES = Path(__file__).parent
NULL = "null run (noise for a reward)"


@dataclass(frozen=True)
class Entry:
    """One algorithm: recipe, configuration, fields that differ from it, world, and its line in the figure."""

    recipe: str
    config: str
    colour: str
    line: str = "-"
    overrides: dict[str, Any] = field(default_factory=dict)
    world: str = "flow"


ENTRIES = {
    "Flow-GRPO, CPS": Entry("flow_grpo", "flow_grpo_shapes", "tab:blue"),
    "Flow-GRPO, Flow-SDE": Entry("flow_grpo", "flow_grpo_shapes_flow_sde", "tab:blue", "--"),
    "Flow-GRPO, Dance-SDE": Entry("flow_grpo", "flow_grpo_shapes_dance_sde", "tab:blue", ":"),
    # Windows that move every four generations are in every place within the default budget.
    "MixGRPO (sliding window)": Entry(
        "flow_grpo", "flow_grpo_shapes_mix_sliding", "tab:cyan", overrides={"sde_window_interval": 4}
    ),
    "GRPO-Guard": Entry("flow_grpo", "flow_grpo_shapes_guard", "tab:cyan", "--"),
    "Flow-GRPO, step-wise credit": Entry("flow_grpo", "flow_grpo_shapes_gain", "tab:purple"),
    "DiffusionNFT": Entry("nft", "nft_shapes", "tab:red"),
    "Online DPO": Entry("online_dpo", "online_dpo_shapes", "tab:red", "--"),
    "ReFL": Entry("refl", "refl_shapes", "tab:green"),
    "DRaFT-K": Entry("refl", "refl_shapes_draft", "tab:green", "--"),
    "DRTune": Entry("refl", "refl_shapes_drtune", "tab:green", ":"),
    "DDPO, importance-sampled": Entry("ddpo", "ddpo_shapes", "tab:orange", world="DDPM"),
    "DDPO, score function": Entry("ddpo", "ddpo_shapes_sf", "tab:orange", "--", world="DDPM"),
    "GRPO (UNet, DDIM)": Entry("grpo", "grpo_shapes_ddpm", "tab:orange", ":", world="DDPM"),
    NULL: Entry(
        "flow_grpo",
        "flow_grpo_shapes",
        "black",
        ":",
        overrides={
            "reward_funcs": "dina_reward.alignment.null_reward",
            # The latent reward is logged and trains nothing.
            "reward_weights": (0, 1),
            "share_noise_within_group": "false",
        },
    ),
}
"""Name in the table: what is run."""

METRICS = ("fit", "cleanness", "reward")
TOLERATED_LOSS = 0.02
"""Fall of cleanness that the recommended algorithm may have."""


@dataclass(frozen=True)
class Budget:
    """Denoiser calls of every run, and at how many marks in them it is evaluated."""

    denoiser_calls: int
    marks: int

    @property
    def options(self) -> dict[str, Any]:
        """Fields of the configuration."""
        return {
            "max_denoiser_calls": self.denoiser_calls,
            "eval_denoiser_calls": max(1, self.denoiser_calls // self.marks),
            "eval_strategy": "no",
            "eval_on_start": True,
            "max_steps": 1_000_000,
        }


def run(entry: Entry, seed: int, budget: Budget, directory: Path, threads: int) -> None:
    """One run in a process of its own; its figures appear in `result.json` when it has ended well."""
    result_file, config = directory / "result.json", RECIPES / "configs" / f"{entry.config}.yaml"
    settings = identity({"seed": seed, **vars(budget), **entry.overrides}, config)
    if read_result(result_file, settings) is not None:
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    command = [sys.executable, str(RECIPES / f"{entry.recipe}.py")]
    options = {"config": config, "seed": seed, "output_dir": directory}
    options |= {"save_strategy": "no", "disable_tqdm": True, **budget.options, **entry.overrides}
    for name, value in options.items():
        command += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(directory / "log.txt", "w", encoding="utf-8") as log:
        code, usage = run_child(command, log, environment)
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}; see {directory / 'log.txt'}")
    costs = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_memory_mb": usage.ru_maxrss / 1024}
    write_result(result_file, settings, {**summary(directory, budget.denoiser_calls), **costs})


def summary(directory: Path, calls: int) -> dict[str, Any]:
    """Figures of a run from the files that the trainer left, at its start and at exactly so many denoiser calls.

    Generations do not end at the budget: figures there are interpolated between the evaluations before and after it.
    """
    history = [json.loads(line) for line in (directory / "evaluation_history.jsonl").read_text().splitlines()]
    scores = [json.loads(line)["scores"] for line in (directory / "evaluation_scores.jsonl").read_text().splitlines()]
    curve = [_point(record, score) for record, score in zip(history, scores, strict=True)]
    spent = [point["denoiser_calls"] for point in curve]
    at_budget = {name: float(np.interp(calls, spent, [point[name] for point in curve])) for name in curve[0]}
    before, after = (np.array(scores[place]["fit"]) for place in (-2, -1))
    fit = before + np.interp(calls, spent[-2:], [0, 1]) * (after - before)
    return {
        "curve": curve,
        "at_budget": at_budget,
        "fit_gain_by_prompt": (fit - np.array(scores[0]["fit"])).tolist(),
        "hacking_alarms": sum(len(record["hacking"]) for record in history),
    }


def _point(record: dict[str, Any], scores: dict[str, list[float]]) -> dict[str, float]:
    """One evaluation; of several rewards the latent one, also as its spread over prompts."""
    reward = next((name for name in scores if "latent" in name.lower()), "reward")
    values = {name: record["metrics"][name] for name in ("fit", "cleanness")}
    return {
        **values,
        "reward": record["metrics"][reward],
        "reward_spread": float(np.std(scores[reward])),
        **record["costs"],
    }


def rows(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row of the table per algorithm: per-seed gains in points, means of the rest."""
    table = []
    for name, runs in results.items():
        start, end = [run["curve"][0] for run in runs], [run["at_budget"] for run in runs]
        pairs = list(zip(start, end, strict=True))
        gains = [100 * (after["fit"] - before["fit"]) for before, after in pairs]
        table.append(
            {
                "algorithm": name,
                "world": ENTRIES[name].world,
                "fit_before": mean(point["fit"] for point in start),
                "fit_after": mean(point["fit"] for point in end),
                "gains": gains,
                "gain": mean(gains),
                "cleanness_change": mean(after["cleanness"] - before["cleanness"] for before, after in pairs),
                "reward_gain": mean((b["reward"] - a["reward"]) / a["reward_spread"] for a, b in pairs),
                **{key: mean(point[key] for point in end) for key in ("train_seconds", "reward_calls")},
                "update_share": mean(point["denoiser_calls/update"] / point["denoiser_calls"] for point in end),
                **{key: mean(run[key] for run in runs) for key in ("cpu_seconds", "peak_memory_mb")},
                "hacking_alarms": sum(run["hacking_alarms"] for run in runs),
            }
        )
    return table


def error_of_a_mean(table: Sequence[dict[str, Any]]) -> float:
    """Standard error, in points, of a mean gain over seeds, from the variance inside all algorithms; NaN for one seed."""
    groups = [row["gains"] for row in table]
    if len(groups[0]) < 2:
        return float("nan")
    return (mean(variance(gains) for gains in groups) / len(groups[0])) ** 0.5


def null_verdict(runs: Sequence[dict[str, Any]]) -> str:
    """Whether the null run gained nothing, within the errors over prompts and over seeds."""
    by_prompt = 100 * np.array([run["fit_gain_by_prompt"] for run in runs])
    gains = by_prompt.mean(axis=1)
    parts = [float(by_prompt.mean(axis=0).std(ddof=1)) / by_prompt.shape[1] ** 0.5]
    parts += [stdev(gains) / len(gains) ** 0.5] if len(gains) > 1 else []
    gain, error = float(gains.mean()), sum(part**2 for part in parts) ** 0.5
    word = "zero within twice its error" if abs(gain) <= 2 * error else "NOT zero: something besides the reward counts"
    return f"The null run gained {gain:+.1f} ± {error:.1f} points of fit: {word}."


def recommendation(table: Sequence[dict[str, Any]], world: str) -> str:
    """The algorithm with the highest mean fit of those that keep cleanness; those within the error of it are ties."""
    here = [row for row in table if row["world"] == world and row["algorithm"] != NULL]
    if not here:
        return ""
    clean = [row for row in here if row["cleanness_change"] >= -TOLERATED_LOSS]
    if not clean:
        best = max(here, key=lambda row: row["cleanness_change"])
        return f"{world} generator: no algorithm keeps cleanness; {best['algorithm']} loses least ({_figures(best)})."
    clean.sort(key=lambda row: row["fit_after"], reverse=True)
    best, margin = clean[0], 2 * 2**0.5 * error_of_a_mean(table)
    ties = [row["algorithm"] for row in clean[1:] if 100 * (best["fit_after"] - row["fit_after"]) <= margin]
    dropped = [row for row in here if row not in clean and row["fit_after"] > best["fit_after"]]
    text = f"{world} generator: take {best['algorithm']} ({_figures(best)})."
    if margin != margin:
        return f"{text} With one seed nothing is known about ties."
    text += f" Differences up to {margin:.1f} points (two standard errors) are ties: {', '.join(ties) or 'none'}."
    if dropped:
        text += " Higher fit, but less clean: " + "; ".join(f"{row['algorithm']} ({_figures(row)})" for row in dropped)
    return text


def _figures(row: dict[str, Any]) -> str:
    return (
        f"fit {row['fit_before']:.3f} → {row['fit_after']:.3f}, cleanness {row['cleanness_change']:+.3f}, "
        f"{row['train_seconds']:.0f} s"
    )


def markdown(table: Sequence[dict[str, Any]], calls: int) -> str:
    """The table as it stands in the documentation."""
    error = error_of_a_mean(table)
    known = f"; the standard error of a mean gain is {error:.1f} points" if error == error else ""
    lines = [
        f"At {calls:,} denoiser calls{known}. Seconds are those of training; in brackets, CPU seconds of the whole process.",
        "",
        "| algorithm | oracle fit | gain in points (per seed) | cleanness | reward (its spread) | calls in updates | "
        "reward calls | seconds (CPU) | alarms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        gains = ", ".join(f"{gain:+.1f}" for gain in row["gains"])
        lines.append(
            f"| {row['algorithm']} | {row['fit_before']:.3f} → {row['fit_after']:.3f} | {row['gain']:+.1f} ({gains}) | "
            f"{row['cleanness_change']:+.3f} | {row['reward_gain']:+.2f} | {100 * row['update_share']:.0f} % | "
            f"{row['reward_calls']:,.0f} | {row['train_seconds']:.0f} ({row['cpu_seconds']:.0f}) | {row['hacking_alarms']} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Means over seeds of fit, cleanness and reward: over denoiser calls on the left, over seconds on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 12), layout="constrained")
    axes = figure.subplots(len(METRICS), 2, sharex="col", sharey="row")
    labels = {"fit": "oracle fit", "cleanness": "oracle cleanness", "reward": "rise of the reward (its spread)"}
    for name, runs in results.items():
        for line, metric in zip(axes, METRICS, strict=True):
            for panel, cost in zip(line, ("denoiser_calls", "train_seconds"), strict=True):
                x, y = _mean_curve(runs, cost, metric)
                entry = ENTRIES[name]
                panel.plot(x, y, color=entry.colour, linestyle=entry.line, marker="o", markersize=3, label=name)
    for line, metric in zip(axes, METRICS, strict=True):
        line[0].set_ylabel(labels[metric])
        for panel in line:
            panel.grid(alpha=0.3)
    axes[-1][0].set_xlabel("denoiser calls")
    axes[-1][1].set_xlabel("seconds of training")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=90)


def _mean_curve(runs: Sequence[dict[str, Any]], cost: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Means over seeds, mark by mark."""
    count = min(len(run["curve"]) for run in runs)
    x = np.array([[point[cost] for point in run["curve"][:count]] for run in runs])
    y = np.array([[point[metric] for point in run["curve"][:count]] for run in runs])
    if metric == "reward":
        spread = np.array([[run["curve"][0]["reward_spread"]] for run in runs])
        y = (y - y[:, :1]) / spread
    return x.mean(axis=0), y.mean(axis=0)


def draw_runs(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Every run: fit and cleanness over denoiser calls, one panel per algorithm, before the fit of all others in grey."""
    from matplotlib.figure import Figure

    columns = min(5, len(results))
    lines = -(-len(results) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel in axes.flat[len(results) :]:
        panel.set_axis_off()
    for panel, (name, runs) in zip(axes.flat, results.items(), strict=False):
        for other in results.values():
            panel.plot(*_mean_curve(other, "denoiser_calls", "fit"), color="0.85", linewidth=0.8, zorder=1)
        for run in runs:
            calls = [point["denoiser_calls"] for point in run["curve"]]
            for metric, style, colour in (("fit", "o-", "tab:blue"), ("cleanness", "s:", "tab:green")):
                values = [point[metric] for point in run["curve"]]
                panel.plot(calls, values, style, color=colour, markersize=3, linewidth=1, label=f"oracle {metric}")
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles[:2], names[:2], loc="outside lower right", ncols=2, fontsize=9, frameon=False)
    figure.supxlabel("denoiser calls", fontsize=10)
    figure.savefig(path, dpi=100)


def run_all(names: Sequence[str], seeds: Sequence[int], budget: Budget, output: Path, jobs: int) -> dict[str, Any]:
    """Results of every algorithm, one per seed."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    places = {
        (name, seed): output / ("null" if name == NULL else ENTRIES[name].config) / f"seed-{seed}"
        for seed in seeds
        for name in names
    }
    runs = [
        partial(run, ENTRIES[name], seed, budget, directory, threads) for (name, seed), directory in places.items()
    ]
    in_parallel(runs, jobs, "runs")
    return {name: [json.loads((places[name, seed] / "result.json").read_text()) for seed in seeds] for name in names}


def write_report(results: dict[str, list[dict[str, Any]]], budget: Budget, jobs: int, output: Path) -> str:
    """Writes table, figures and JSON; returns what is to be printed."""
    table = rows(results)
    verdicts = [text for world in ("flow", "DDPM") if (text := recommendation(table, world))]
    if NULL in results:
        verdicts.append(null_verdict(results[NULL]))
    report = {
        "made": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "jobs": jobs,
        **vars(budget),
        "error_of_a_mean": error_of_a_mean(table),
        "verdicts": verdicts,
        "table": table,
        "runs": results,
    }
    text = markdown(table, budget.denoiser_calls) + "\n" + "\n\n".join(verdicts) + "\n"
    write_whole(output / "comparison.json", json.dumps(report, indent=1) + "\n")
    write_whole(output / "comparison.md", text)
    draw(results, output / "comparison.png")
    draw_runs(results, output / "comparison_runs.png")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the alignment algorithms on the embedded world.")
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), help="directory of runs and table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run per algorithm and seed")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time; they share the cores")
    parser.add_argument("--denoiser-calls", type=int, default=30_000, help="budget of every run")
    parser.add_argument("--marks", type=int, default=5, help="evaluations in it, after the one at the start")
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), help="run these algorithms alone")
    arguments = parser.parse_args()
    faults_in_one_line()
    budget = Budget(arguments.denoiser_calls, arguments.marks)
    print(f"runs and table: {arguments.output}")
    with sole_owner(arguments.output):
        results = run_all(arguments.only or list(ENTRIES), arguments.seeds, budget, arguments.output, arguments.jobs)
        print(write_report(results, budget, arguments.jobs, arguments.output))


if __name__ == "__main__":
    main()
