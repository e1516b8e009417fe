"""The method's claims, measured where the truth is known: rewards of six kinds on the embedded world, three seeds each.

    python recipes/ablate_reward.py --output outputs/ablation    # restartable; under 45 minutes on two cores

| variant | likelihood | loss | levels in training | backbone |
|---|---|---|---|---|
| noise-calibrated | Thurstone, variance 2 sigma^2 + .05 | fidelity | uniform | LoRA |
| noise-calibrated, NLL | the same | negative log-likelihood | uniform | LoRA |
| fixed variance | Thurstone, variance .5 | fidelity | uniform | LoRA |
| Bradley-Terry | logistic | negative log-likelihood | uniform | LoRA |
| clean only | Thurstone, variance .5 | fidelity | 0 | LoRA |
| frozen backbone | Thurstone, variance 2 sigma^2 + .05 | fidelity | uniform | frozen |

Everything else is equal. Labels are single votes, as in the published training set: a noisy labeller prefers the latent of
higher quality with probability Phi(difference / 0.1). Each reward is evaluated on held-out pairs at every level and for
ensembles of 2, 3 and 5 levels (accuracy against the oracle, calibration against the labeller's probabilities), and then
aligns the embedded generator by Flow-GRPO, where the oracle says whether more reward was more truth. Every run is a process
of its own; the command can be killed and started again: runs that are complete are kept. It writes `ablation.json`,
`ablation.md` and `ablation.png` to the output.
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
from statistics import mean, stdev
from typing import Any

from tqdm.auto import tqdm

from dina_reward.shapes.ablation import (
    BATCH_SIZE,
    ENSEMBLES,
    ITERATIONS,
    RESULT_NAME,
    STEPS,
    VARIANTS,
    Variant,
    make_pairs,
)


def summary(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per variant: means over seeds, of the main figures with the deviation over seeds."""
    return [_row(VARIANTS[name], results) for name, results in runs.items()]


def _row(variant: Variant, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def spread(values: Sequence[float]) -> list[float]:
        return [mean(values), stdev(values) if len(values) > 1 else 0.0]

    def gain(metric: str, units: Sequence[float]) -> list[float]:
        ends = [result["alignment"][metric] for result in results]
        return spread([(after - before) / unit for (before, after), unit in zip(ends, units, strict=True)])

    level, levels, points = f"{variant.use_level:g}", list(results[0]["levels"]), [0.01] * len(results)
    return {
        "variant": variant.title,
        "use_level": variant.use_level,
        "accuracy_at_use_level": spread([100 * r["levels"][level]["accuracy"] for r in results]),
        "accuracy_by_level": {key: spread([100 * r["levels"][key]["accuracy"] for r in results]) for key in levels},
        "ece_by_level": {key: spread([r["levels"][key]["ece"] for r in results]) for key in levels},
        "ece_fitted": None
        if results[0]["fitted"] is None
        else {key: spread([r["fitted"]["ece"][key] for r in results]) for key in levels},
        "ensembles": {
            kind: {
                count: {
                    "accuracy": spread([100 * r["ensembles"][kind][count]["accuracy"] for r in results]),
                    "gain": spread(
                        [
                            100 * (r["ensembles"][kind][count]["accuracy"] - r["ensembles"][kind]["1"]["accuracy"])
                            for r in results
                        ]
                    ),
                    "ece": spread([r["ensembles"][kind][count]["ece"] for r in results]),
                }
                for count in results[0]["ensembles"][kind]
            }
            for kind in ("mean", "tokens")
        },
        "reward_gain": gain("reward", [r["score_std"][level] for r in results]),
        "fit_gain": gain("fit", points),
        "cleanness_gain": gain("cleanness", points),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The tables as they stand in the documentation."""
    levels, counts = list(rows[0]["accuracy_by_level"]), list(rows[0]["ensembles"]["mean"])

    def pm(value: Sequence[float]) -> str:
        return f"{value[0]:.1f} ± {value[1]:.1f}"

    def signed(value: Sequence[float]) -> str:
        return f"{value[0]:+.1f} ± {value[1]:.1f}"

    def ensembles(row: dict[str, Any], count: str) -> str:
        averaged, tokens = (row["ensembles"][kind][count] for kind in ("mean", "tokens"))
        if count == "1":
            return f"{pm(averaged['accuracy'])} ({averaged['ece'][0]:.3f})"
        both = f"{signed(averaged['gain'])} / {signed(tokens['gain'])}"
        return f"{both} ({averaged['ece'][0]:.3f} / {tokens['ece'][0]:.3f})"

    by_level = [
        [row["variant"], *(f"{row['accuracy_by_level'][k][0]:.1f} / {row['ece_by_level'][k][0]:.3f}" for k in levels)]
        for row in rows
    ]
    fitted = [
        [row["variant"], *(f"{row['ece_fitted'][k][0]:.3f}" for k in levels)] for row in rows if row["ece_fitted"]
    ]
    by_count = [[row["variant"], *(ensembles(row, count) for count in counts)] for row in rows]
    aligned = [
        [row["variant"], f"{row['use_level']:g}", pm(row["accuracy_at_use_level"])]
        + [signed(row[gain]) for gain in ("reward_gain", "fit_gain", "cleanness_gain")]
        for row in rows
    ]
    columns = ("variant", "level", "accuracy there (%)", "reward (its own deviations)", "oracle fit", "cleanness")
    return "\n".join(
        [
            "Accuracy (%) by noise level, mean over seeds; after the slash the expected calibration error.\n",
            _table(["variant", *levels], by_level),
            "Calibration error with the Thurstone variance fitted to single votes on fresh pairs of training captions.\n",
            _table(["variant", *levels], fitted),
            "Ensembles around level .4: accuracy of the single level (%), and what an average of scores / attention over "
            "all tokens adds to it (points), ± deviation over seeds; in brackets the calibration error.\n",
            _table(["variant", *(f"K = {count}" for count in counts)], by_count),
            "Flow-GRPO with each reward at its level: change on held-out prompts ± deviation over seeds. The reward in "
            "standard deviations of its scores on the held-out pairs, the oracle in points.\n",
            _table(columns, aligned),
        ]
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy and calibration over the noise level, ensembles, and what alignment did."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.8), layout="constrained")
    accuracy, calibration, ensembles, aligned = figure.subplots(2, 2).flat
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        levels = [float(key) for key in row["accuracy_by_level"]]
        shift = (place - (len(rows) - 1) / 2) * width
        style: dict[str, Any] = {"color": f"C{place}", "ms": 4, "lw": 1.2, "capsize": 2}
        for panel, key in ((accuracy, "accuracy_by_level"), (calibration, "ece_by_level")):
            values, errors = zip(*row[key].values(), strict=True)
            label = row["variant"] if panel is accuracy else None
            panel.errorbar([level + 0.02 * shift for level in levels], values, errors, fmt="o-", label=label, **style)
        for kind, mark, face in (("mean", "o", f"C{place}"), ("tokens", "s", "white")):
            values, errors = zip(*(found["gain"] for found in row["ensembles"][kind].values()), strict=True)
            places = [position + shift + (0.03 if kind == "tokens" else -0.03) for position in range(1, len(values))]
            ensembles.errorbar(places, values[1:], errors[1:], fmt=mark, mfc=face, **style)
        for group, gain in enumerate(("fit_gain", "cleanness_gain")):
            value, error = row[gain]
            aligned.bar(group + shift, value, 0.9 * width, yerr=error, capsize=2, color=f"C{place}")
    accuracy.set(title="accuracy on held-out pairs (%)", xlabel="noise level")
    calibration.set(title="expected calibration error", xlabel="noise level", ylim=(0, None))
    ensembles.set(
        title="what ensembles add to a single level (points): average (filled), tokens (hollow)", xlabel="levels"
    )
    ensembles.set_xticks(range(1, len(ENSEMBLES)), [f"{count}" for count in ENSEMBLES if count > 1])
    aligned.set(title="alignment with the reward: change in the oracle's view (points)")
    aligned.set_xticks([0, 1], ["fit", "cleanness"])
    for panel in (ensembles, aligned):
        panel.axhline(0, color="0.3", lw=0.8)
    for panel in (accuracy, calibration, ensembles, aligned):
        panel.grid(alpha=0.3)
        panel.title.set_fontsize(10)
    figure.legend(loc="outside lower center", ncols=len(rows), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def launch(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """One run in a process of its own."""
    directory = arguments.output / name / f"seed-{seed}"
    if (directory / RESULT_NAME).is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dina_reward.shapes.ablation", name, str(seed), "--output", str(arguments.output)]
    command += ["--steps", str(arguments.steps), "--iterations", str(arguments.iterations)]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    with open(directory / "log.txt", "w", encoding="utf-8") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}; see {directory / 'log.txt'}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ablate the latent reward on the embedded world.")
    parser.add_argument("--output", type=Path, default=Path("outputs/ablation"), help="directory of runs and tables")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run per variant and seed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time; they share the cores")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these variants alone")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"optimizer steps of each reward, {BATCH_SIZE} pairs each"
    )
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="alignment iterations with each reward")
    arguments = parser.parse_args()
    started, names = time.perf_counter(), arguments.only or list(VARIANTS)
    kept = any(arguments.output.glob(f"*/seed-*/{RESULT_NAME}"))
    print(f"runs and tables: {arguments.output}")
    make_pairs(arguments.output / "pairs")
    places = [(name, seed) for seed in arguments.seeds for name in names]
    with ThreadPoolExecutor(arguments.jobs) as pool, tqdm(total=len(places), desc="runs") as progress:
        futures = []
        for name, seed in places:
            futures.append(pool.submit(launch, name, seed, arguments))
            futures[-1].add_done_callback(lambda _: progress.update())
        for future in futures:
            future.result()
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
    (arguments.output / "ablation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "ablation.md").write_text(markdown(table), encoding="utf-8")
    draw(table, arguments.output / "ablation.png")
    print(markdown(table))


if __name__ == "__main__":
    main()
