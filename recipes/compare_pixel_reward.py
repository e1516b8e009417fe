"""Latent against pixel reward on the embedded world: accuracy, calibration, cost, and what alignment with each brings.

    python recipes/compare_pixel_reward.py --output outputs/pixel --jobs 2    # restartable

The latent reward is the one that ships. The pixel reward is a residual network with about as many parameters, trained on the
same pairs by the same likelihood, loss and optimizer; it reads the decoded images with their captions. It gets as many steps
as the first of the latent reward's phases; `--steps 9900` are those of all of them. The
command makes these pairs again (or takes those of a build with `--world`), trains the pixel reward, judges both on the same
held-out pairs, and aligns the embedded generator with each by Flow-GRPO under the same settings, several seeds each, while
the oracle judges held-out prompts. Every job is a process of its own; the command can be killed and started again: jobs that
are complete are kept. It writes `pixel.json`, `pixel.md` and `pixel.png` to the output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dina_reward.checkpoints.locking import sole_owner
from dina_reward.recipes.arguments import faults_in_one_line
from dina_reward.shapes.alignment import ITERATIONS
from dina_reward.shapes.jobs import RESULT_NAME, Job, run_jobs, threads_per_job
from dina_reward.shapes.pixel_comparison import CELLS, KINDS, OVERALL
from dina_reward.shapes.pixel_reward import STEPS


MODULE = "dina_reward.shapes.pixel_comparison"
COLOURS = {"latent": "tab:blue", "pixel": "tab:orange"}
AXES = {"train_cpu_seconds": "CPU seconds of training", "denoiser_calls": "denoiser calls (thousands)"}
METRICS = {"fit": "oracle fit", "cleanness": "oracle cleanness"}


def jobs_of(arguments: argparse.Namespace) -> list[list[Job]]:
    """Three rounds: the preferences; what needs no pixel reward, beside its training; what does."""
    output = arguments.output
    world = ["--world", arguments.world or output / "world"]

    def job(name: str, *words: Any) -> Job:
        return Job(["-m", MODULE, *words, "--output", output], output / name / RESULT_NAME)

    def of_kind(kind: str) -> list[Job]:
        runs = [
            job(f"align-{kind}/seed-{seed}", "align", kind, "--seed", seed, "--iterations", arguments.iterations)
            for seed in arguments.seeds
        ]
        return [job(f"evaluate-{kind}", "evaluate", kind, *world), *runs]

    train = job("train", "train", "--steps", arguments.steps, *world)
    return [[job("pairs", "pairs", *world)], [train, *of_kind("latent")], of_kind("pixel")]


def read_results(output: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Figures of all jobs, by reward: ``evaluation`` and ``runs``; and those of the pixel reward's training."""

    def read(name: str) -> Any:
        return json.loads((output / name / RESULT_NAME).read_text(encoding="utf-8"))

    results: dict[str, Any] = {"train": read("train")}
    for kind in KINDS:
        runs = [read(f"align-{kind}/seed-{seed}") for seed in seeds]
        results[kind] = {"evaluation": read(f"evaluate-{kind}"), "runs": runs}
    return results


def reached(history: Sequence[dict[str, float]], level: float, axis: str) -> float | None:
    """Where on an axis the oracle fit first reaches a level, between evaluations linearly; ``None`` if it never does."""
    for before, after in pairwise(history):
        if before["fit"] >= level:
            return before[axis]
        if after["fit"] >= level:
            share = (level - before["fit"]) / (after["fit"] - before["fit"])
            return before[axis] + share * (after[axis] - before[axis])
    return history[-1][axis] if history[-1]["fit"] >= level else None


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """What alignment with each reward brought, over seeds as mean and deviation, and what it took to reach one fit.

    That fit is the lowest that any run ends with, so that every run reaches it.
    """
    level = min(run["history"][-1]["fit"] for kind in KINDS for run in results[kind]["runs"])
    rows: dict[str, Any] = {"fit_level": level}
    for kind in KINDS:
        runs = results[kind]["runs"]
        ends = [(run["history"][0], run["history"][-1]) for run in runs]
        rows[kind] = {
            **{
                f"{name}_{place}": _spread([end[index][name] for end in ends])
                for name in METRICS
                for index, place in enumerate(("before", "after"))
            },
            "gains": [100 * (after["fit"] - before["fit"]) for before, after in ends],
            "seconds_to_level": _spread([reached(run["history"], level, "train_cpu_seconds") for run in runs]),
            "calls_to_level": _spread([reached(run["history"], level, "denoiser_calls") for run in runs]),
            **{
                key: _spread([run["history"][-1][key] for run in runs])
                for key in ("train_seconds", "train_cpu_seconds", "denoiser_calls", "reward_calls", "decoder_calls")
            },
            **{key: _spread([run[key] for run in runs]) for key in ("cpu_seconds", "reward_share", "peak_memory_mb")},
            "hacking_alarms": sum(run["hacking_alarms"] for run in runs),
        }
    return rows


def _spread(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return [mean(known), stdev(known) if len(known) > 1 else 0.0]


def markdown(results: dict[str, Any], rows: dict[str, Any]) -> str:
    """The tables as they stand in the documentation."""
    return "\n".join([_accuracy_table(results), _cost_table(results), _alignment_table(rows)])


def _accuracy_table(results: dict[str, Any]) -> str:
    lines = [
        "Accuracy (%) against the oracle, ± standard error, on held-out pairs, all of them and those that differ in one "
        "thing alone; calibration error on all.\n",
        f"| reward | all | {' | '.join(CELLS)} | calibration error |",
        "|---" * (len(CELLS) + 3) + "|",
    ]
    for kind in KINDS:
        evaluation = results[kind]["evaluation"]
        cells = [_accuracy(evaluation, name) for name in (OVERALL, *CELLS)]
        lines.append(f"| {kind} | {' | '.join(cells)} | {evaluation['ece']:.3f} |")
    counts = results[KINDS[0]]["evaluation"]["pairs"]
    lines.append(f"| (pairs) | {' | '.join(str(counts[name]) for name in (OVERALL, *CELLS))} | |")
    return "\n".join(lines) + "\n"


def _accuracy(evaluation: dict[str, Any], name: str) -> str:
    if not evaluation["pairs"][name]:
        return "no pairs"
    return f"{100 * evaluation['accuracy'][name]:.1f} ± {100 * evaluation['standard_error'][name]:.1f}"


def _cost_table(results: dict[str, Any]) -> str:
    lines = [
        "What a score costs: CPU time, in batches as in alignment.\n",
        "| reward | parameters (trained) | CPU ms per sample | of it decoding | memory while scoring (MB) |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        evaluation = results[kind]["evaluation"]
        cost, trained = evaluation["cost"], evaluation["trained_parameters"]
        lines.append(
            f"| {kind} | {evaluation['parameters']:,} ({trained:,}) | {cost['score_ms']:.2f} | {cost['decode_ms']:.2f} | "
            f"{cost['peak_memory_mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _alignment_table(rows: dict[str, Any]) -> str:
    level = f"{rows['fit_level']:.3f}"
    lines = [
        "Flow-GRPO with each reward: held-out prompts before and after, means ± deviations over seeds; seconds are "
        "of training, without evaluations.\n",
        "| reward | oracle fit | gain in points, per seed | cleanness | seconds (CPU) | reward's share | "
        f"CPU seconds to fit {level} | denoiser calls to fit {level} | decoder calls | peak MB |",
        "|---" * 10 + "|",
    ]
    for kind in KINDS:
        row = rows[kind]
        gains = ", ".join(f"{gain:+.1f}" for gain in row["gains"])
        seconds = f"{row['train_seconds'][0]:.0f} ({_pm(row['train_cpu_seconds'], '.0f')})"
        lines.append(
            f"| {kind} | {row['fit_before'][0]:.3f} → {_pm(row['fit_after'], '.3f')} | {gains} | "
            f"{row['cleanness_before'][0]:.3f} → {_pm(row['cleanness_after'], '.3f')} | {seconds} | "
            f"{100 * row['reward_share'][0]:.1f} % | {_pm(row['seconds_to_level'], '.0f')} | "
            f"{_pm(row['calls_to_level'], ',.0f')} | {row['decoder_calls'][0]:,.0f} | {row['peak_memory_mb'][0]:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _pm(value: Sequence[float] | None, form: str) -> str:
    return "never" if value is None else f"{value[0]:{form}} ± {value[1]:{form}}"


def draw(results: dict[str, Any], path: Path) -> None:
    """Oracle fit and cleanness over seconds and calls, a thin line per seed and a bold mean; accuracy and cost as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, metric in enumerate(METRICS):
        for column, axis in enumerate(AXES):
            _draw_curves(axes[row, column], results, metric, axis)
    _draw_accuracy(axes[0, 2], results)
    _draw_cost(axes[1, 2], results)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        panel.title.set_fontsize(11)
    axes[0, 0].legend(fontsize=9, loc="lower right")
    figure.savefig(path, dpi=110)


def _draw_curves(panel: Any, results: dict[str, Any], metric: str, axis: str) -> None:
    unit: Callable[[float], float] = (lambda value: value / 1000) if axis == "denoiser_calls" else float
    for kind in KINDS:
        histories = [run["history"] for run in results[kind]["runs"]]
        curves = [([unit(record[axis]) for record in each], [record[metric] for record in each]) for each in histories]
        for places, values in curves:
            panel.plot(places, values, color=COLOURS[kind], linewidth=0.8, alpha=0.5)
        # All runs are evaluated after the same steps, so that means are over equal places in training.
        middle = [[mean(points) for points in zip(*parts, strict=True)] for parts in zip(*curves, strict=True)]
        panel.plot(*middle, color=COLOURS[kind], linewidth=2.4, label=f"{kind} reward, mean of {len(curves)} seeds")
    panel.set(title=f"{METRICS[metric]} of held-out prompts", xlabel=AXES[axis], ylabel=METRICS[metric])


def _draw_accuracy(panel: Any, results: dict[str, Any]) -> None:
    names = (OVERALL, *CELLS)
    for place, kind in enumerate(KINDS):
        evaluation = results[kind]["evaluation"]
        centres = [index + 0.4 * (place - 0.5) for index in range(len(names))]
        values, errors = ([100 * evaluation[key][name] for name in names] for key in ("accuracy", "standard_error"))
        panel.bar(centres, values, 0.38, yerr=errors, capsize=2, color=COLOURS[kind])
    panel.axhline(50, color="0.3", linewidth=0.8, linestyle="--")
    panel.set(title="held-out pairs right (dashed: chance)", ylabel="%", ylim=(40, 102))
    panel.set_xticks(range(len(names)), [name.replace("background", "back-\nground") for name in names], fontsize=9)


def _draw_cost(panel: Any, results: dict[str, Any]) -> None:
    for place, kind in enumerate(KINDS):
        cost = results[kind]["evaluation"]["cost"]
        reading = cost["score_ms"] - cost["decode_ms"]
        panel.bar(place, reading, 0.5, color=COLOURS[kind], label=f"{kind} reward")
        if cost["decode_ms"]:
            panel.bar(place, cost["decode_ms"], 0.5, bottom=reading, color="0.7", hatch="//", label="decoding")
        peak = mean(run["peak_memory_mb"] for run in results[kind]["runs"])
        text = f"{cost['score_ms']:.2f} ms\nalignment's peak: {peak:.0f} MB"
        panel.annotate(text, (place, cost["score_ms"]), ha="center", va="bottom", fontsize=9)
    panel.set(title="cost of a score", ylabel="CPU ms per sample", xlim=(-0.6, len(KINDS) - 0.4))
    panel.set_ylim(0, 1.25 * max(results[kind]["evaluation"]["cost"]["score_ms"] for kind in KINDS))
    panel.set_xticks(range(len(KINDS)), KINDS)
    panel.legend(fontsize=9, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the latent with a pixel reward on the embedded world.")
    parser.add_argument("--output", type=Path, default=Path("outputs/pixel"), help="directory of jobs and tables")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="one alignment run per reward and seed"
    )
    parser.add_argument("--jobs", type=int, default=2, help="jobs at the same time; they share the cores")
    parser.add_argument(
        "--iterations", type=int, default=ITERATIONS, help="generations of samples of an alignment run"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of the pixel reward, 64 pairs each")
    parser.add_argument(
        "--world",
        type=Path,
        help="output of `python -m dina_reward.shapes.build`, whose preferences are taken as they are",
    )
    arguments = parser.parse_args()
    faults_in_one_line()
    with sole_owner(arguments.output):
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """All jobs and tables."""
    print(f"jobs and tables: {arguments.output}")
    for batch in jobs_of(arguments):
        run_jobs(batch, arguments.jobs)
    results = read_results(arguments.output, arguments.seeds)
    rows = summary(results)
    report = {
        "made": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "jobs": arguments.jobs,
        "threads_per_job": threads_per_job(arguments.jobs),
        "iterations": arguments.iterations,
        "alignment": rows,
        "results": results,
    }
    (arguments.output / "pixel.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "pixel.md").write_text(markdown(results, rows), encoding="utf-8")
    draw(results, arguments.output / "pixel.png")
    print(markdown(results, rows))


if __name__ == "__main__":
    main()
