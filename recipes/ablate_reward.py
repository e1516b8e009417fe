"""The method's claims, measured where the truth is known: rewards of eight kinds on the embedded world, two seeds each.

    python recipes/ablate_reward.py --output outputs/ablation    # restartable; 49 minutes on two cores

| variant | likelihood | loss | levels in training | backbone |
|---|---|---|---|---|
| noise-calibrated | Thurstone, variance 2 sigma^2 + .05 | fidelity | uniform | LoRA |
| noise-calibrated, NLL | the same | negative log-likelihood | uniform | LoRA |
| fixed variance | Thurstone, variance .5 | fidelity | uniform | LoRA |
| Bradley-Terry | logistic | negative log-likelihood | uniform | LoRA |
| clean only | Thurstone, variance .5 | fidelity | 0 | LoRA |
| frozen backbone | Thurstone, variance 2 sigma^2 + .05 | fidelity | uniform | frozen |

The first and the third are trained once more on uneven labels, whose error grows where there is less to see: it is twice as
large for captions of a small shape, and up to three times as large where a latent is not clean
(`dina_reward.shapes.ablation.uneven_deviation`). Everything else is equal. Labels are single votes, as in the published
training set: a noisy labeller prefers the latent of higher quality with probability Phi(difference / deviation).

Pairs are of two independent draws: a reward that trains this shortly learns little from pairs that differ in one attribute.

Each reward is evaluated on held-out pairs under three noise draws, at every level and for ensembles: averages of draws at
one level, and levels that share their noise or have noise of their own, averaged or over tokens (accuracy against the
oracle, calibration against the labeller's probabilities). The rewards of even labels then align the embedded generator by
Flow-GRPO, where the oracle says whether more reward was more truth. Every run is a process of its own; the command can be
killed and started again: runs that are complete are kept. It writes `ablation.json`, `ablation.md` and `ablation.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dina_reward.checkpoints.kept_results import identity, read_result, write_result, write_whole
from dina_reward.checkpoints.locking import sole_owner
from dina_reward.checks.children import in_parallel, run_child
from dina_reward.recipes.arguments import faults_in_one_line
from dina_reward.shapes.ablation import (
    BATCH_SIZE,
    ITERATIONS,
    RESULT_NAME,
    SINGLE,
    STEPS,
    VARIANTS,
    Variant,
    make_pairs,
)


def summary(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per variant: means over seeds, of the main figures with the deviation over seeds."""
    return [_row(VARIANTS[name], results) for name, results in runs.items()]


def _spread(values: Sequence[float]) -> list[float]:
    return [mean(values), stdev(values) if len(values) > 1 else 0.0]


def _row(variant: Variant, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    level, levels, single = f"{variant.use_level:g}", list(results[0]["levels"]), f"{SINGLE:g}"

    def over_levels(figure: Any) -> dict[str, list[float]]:
        return {key: _spread([figure(result, key) for result in results]) for key in levels}

    row: dict[str, Any] = {
        "variant": variant.title,
        "use_level": variant.use_level,
        "accuracy_at_use_level": _spread([100 * r["levels"][level]["accuracy"] for r in results]),
        "accuracy_by_level": over_levels(lambda result, key: 100 * result["levels"][key]["accuracy"]),
        "ece_by_level": over_levels(lambda result, key: result["levels"][key]["ece"]),
        "noise_share_by_level": over_levels(lambda result, key: 100 * result["noise_share"][key]),
        "ece_fitted": None,
        "ensembles": {
            name: {
                "gain": _spread(
                    [100 * (r["ensembles"][name]["accuracy"] - r["levels"][single]["accuracy"]) for r in results]
                ),
                "nll_gain": _spread([r["levels"][single]["nll"] - r["ensembles"][name]["nll"] for r in results]),
                "ece": _spread([r["ensembles"][name]["ece"] for r in results]),
            }
            for name in results[0]["ensembles"]
        },
        "gains": None,
    }
    if all(result["fitted"] is not None for result in results):
        row["ece_fitted"] = over_levels(lambda result, key: result["fitted"]["ece"][key])
    if results[0]["alignment"] is not None:
        units = {"reward": [r["score_std"] for r in results], "fit": [0.01] * len(results)}
        row["gains"] = {
            metric: _spread(
                [
                    (result["alignment"][metric][1] - result["alignment"][metric][0]) / unit
                    for result, unit in zip(results, units.get(metric, units["fit"]), strict=True)
                ]
            )
            for metric in ("reward", "fit", "cleanness")
        }
    return row


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The tables as they stand in the documentation."""
    levels, ensembles = list(rows[0]["accuracy_by_level"]), list(rows[0]["ensembles"])

    def by_level(cell: Any, shown: Sequence[dict[str, Any]] = rows) -> str:
        return _table(["variant", *levels], [[row["variant"], *(cell(row, key) for key in levels)] for row in shown])

    gains = [
        [
            name,
            *(
                f"{_signed(row['ensembles'][name]['gain'])} ({row['ensembles'][name]['nll_gain'][0]:+.3f})"
                for row in rows
            ),
        ]
        for name in ensembles
    ]
    aligned = [
        [row["variant"], f"{row['use_level']:g}", _plus_minus(row["accuracy_at_use_level"])]
        + [_signed(row["gains"][metric]) for metric in ("reward", "fit", "cleanness")]
        for row in rows
        if row["gains"]
    ]
    columns = ("variant", "level", "accuracy there (%)", "reward (its own deviations)", "oracle fit", "cleanness")
    return "\n".join(
        [
            "Accuracy (%) by noise level, mean over seeds; after the slash the expected calibration error.\n",
            by_level(lambda row, key: f"{row['accuracy_by_level'][key][0]:.1f} / {row['ece_by_level'][key][0]:.3f}"),
            "Calibration error with the Thurstone variance fitted to single votes on fresh pairs of training captions.\n",
            by_level(lambda row, key: f"{row['ece_fitted'][key][0]:.3f}", [row for row in rows if row["ece_fitted"]]),
            "Share of the variance of score margins that is noise (%), by noise level, ± deviation over seeds.\n",
            by_level(lambda row, key: _plus_minus(row["noise_share_by_level"][key])),
            f"Ensembles: what they add to the accuracy of one draw at level {SINGLE:g} (points), ± deviation over seeds; in "
            "brackets by how much the NLL is lower.\n",
            _table(["ensemble", *(row["variant"] for row in rows)], gains),
            "Flow-GRPO with each reward at its level: change on held-out prompts ± deviation over seeds. The reward in "
            "standard deviations of its scores on the held-out pairs, the oracle in points.\n",
            _table(columns, aligned),
        ]
    )


def _plus_minus(value: Sequence[float]) -> str:
    return f"{value[0]:.1f} ± {value[1]:.1f}"


def _signed(value: Sequence[float]) -> str:
    return f"{value[0]:+.1f} ± {value[1]:.1f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy, calibration and share of noise over the noise level, ensembles, and what alignment did."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    by_level = top.subplots(1, 3)
    ensembles, aligned = bottom.subplots(1, 2, width_ratios=(2.2, 1))
    panels = dict(zip(("accuracy_by_level", "ece_by_level", "noise_share_by_level"), by_level, strict=True))
    names, width = list(rows[0]["ensembles"]), 0.8 / len(rows)
    for place, row in enumerate(rows):
        shift = (place - (len(rows) - 1) / 2) * width
        style: dict[str, Any] = {"color": f"C{place}", "ms": 4, "lw": 1.2, "capsize": 2}
        for key, panel in panels.items():
            values, errors = zip(*row[key].values(), strict=True)
            label = row["variant"] if key == "accuracy_by_level" else None
            places = [float(level) + 0.02 * shift for level in row[key]]
            panel.errorbar(places, values, errors, fmt="o-", label=label, **style)
        values, errors = zip(*(row["ensembles"][name]["gain"] for name in names), strict=True)
        ensembles.errorbar(values, [i + shift for i in range(len(names))], xerr=errors, fmt="o", **style)
        for group, metric in enumerate(("fit", "cleanness")):
            if row["gains"]:
                value, error = row["gains"][metric]
                aligned.bar(group + shift, value, 0.9 * width, yerr=error, capsize=2, color=f"C{place}")
    panels["accuracy_by_level"].set(title="accuracy on held-out pairs (%)", xlabel="noise level")
    panels["ece_by_level"].set(title="expected calibration error", xlabel="noise level", ylim=(0, None))
    panels["noise_share_by_level"].set(title="share of margin variance that is noise (%)", xlabel="noise level")
    ensembles.set(title=f"accuracy of ensembles over one draw at level {SINGLE:g} (points)")
    ensembles.set_yticks(range(len(names)), names, fontsize=8)
    ensembles.invert_yaxis()
    ensembles.axvline(0, color="0.3", lw=0.8)
    aligned.set(title="what alignment changes (oracle, points)")
    aligned.set_xticks([0, 1], ["fit", "cleanness"])
    aligned.axhline(0, color="0.3", lw=0.8)
    for panel in (*by_level, ensembles, aligned):
        panel.grid(alpha=0.3)
        panel.title.set_fontsize(10)
    figure.legend(loc="outside lower center", ncols=min(4, len(rows)), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def launch(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """One run in a process of its own."""
    directory = arguments.output / name / f"seed-{seed}"
    request = directory / "request.json"
    settings = identity({"variant": name, "steps": arguments.steps, "iterations": arguments.iterations})
    # Results of earlier versions have no request beside them.
    if (directory / RESULT_NAME).is_file() and (not request.exists() or read_result(request, settings) is not None):
        return
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dina_reward.shapes.ablation", name, str(seed), "--output", str(arguments.output)]
    command += ["--steps", str(arguments.steps), "--iterations", str(arguments.iterations)]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with open(directory / "log.txt", "w", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code, _ = run_child(command, log, environment)
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}; see {directory / 'log.txt'}")
    write_result(request, settings, {})


def main() -> None:
    parser = argparse.ArgumentParser(description="Ablate the latent reward on the embedded world.")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"), help="directory of runs and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one run per variant and seed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time; they share the cores")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these variants alone")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"optimizer steps of each reward, {BATCH_SIZE} pairs each"
    )
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="alignment iterations with each reward")
    arguments = parser.parse_args()
    faults_in_one_line()
    with sole_owner(arguments.output):
        ablate(arguments)


def ablate(arguments: argparse.Namespace) -> None:
    """All runs and tables."""
    started, names = time.perf_counter(), arguments.only or list(VARIANTS)
    kept = any(arguments.output.glob(f"*/seed-*/{RESULT_NAME}"))
    print(f"runs and tables: {arguments.output}")
    make_pairs(arguments.output / "pairs")
    places = [(name, seed) for seed in arguments.seeds for name in names]
    in_parallel([partial(launch, name, seed, arguments) for name, seed in places], arguments.jobs, "runs")
    runs = {
        name: [
            json.loads((arguments.output / name / f"seed-{seed}" / RESULT_NAME).read_text())
            for seed in arguments.seeds
        ]
        for name in names
    }
    table = summary(runs)
    report = {
        "made": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "jobs": arguments.jobs,
        "steps": arguments.steps,
        "iterations": arguments.iterations,
        "seconds": None if kept else time.perf_counter() - started,
        "table": table,
        "runs": runs,
    }
    write_whole(arguments.output / "ablation.json", json.dumps(report, indent=1) + "\n")
    write_whole(arguments.output / "ablation.md", markdown(table))
    draw(table, arguments.output / "ablation.png")
    print(markdown(table))


if __name__ == "__main__":
    main()
