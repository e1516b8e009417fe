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
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tqdm.auto import tqdm


@dataclass(frozen=True)
class Variant:
    """What differs from the published recipe.

    Args:
        title: name in the table.
        reward: fields of `LatentRewardConfig`.
        training: fields of `LatentRewardTrainingConfig`.
        use_level: noise level at which the reward is used in alignment, one that it was trained at.
    """

    title: str
    reward: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    use_level: float = 0.4


FIXED = {"variance_scale": 0.0, "variance_offset": 0.5}
VARIANTS = {
    "calibrated": Variant("noise-calibrated"),
    "calibrated_nll": Variant("noise-calibrated, NLL", training={"loss_type": "thurstone_nll"}),
    "fixed_variance": Variant("fixed variance", reward=FIXED),
    "bradley_terry": Variant(
        "Bradley-Terry", reward={"likelihood": "bradley_terry"}, training={"loss_type": "bradley_terry"}
    ),
    "clean_only": Variant(
        "clean only", reward=FIXED, training={"level_distribution": "constant", "level_value": 0.0}, use_level=0.0
    ),
    "frozen": Variant("frozen backbone", training={"freeze_backbone": True}),
}
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ENSEMBLES = {1: (0.4,), 2: (0.3, 0.5), 3: (0.2, 0.4, 0.6), 5: (0.2, 0.3, 0.4, 0.5, 0.6)}
"""Number of levels: the levels, all around .4."""

BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 64, 1.5e-3, 0.985
TRAIN_POOL, TEST_POOL = 1024, 128
TRAIN_PAIRS, TEST_PAIRS = 80_000, 2_600
KINDS = ("render", "ode", "sde")
"""Sources of the latents: renders and samples. Degraded ones, which are told apart without reading the prompt, are left out,
and so are pairs of negligible gap: a reward that trains this shortly would learn little else."""
EVALUATION_SEED = 1234


def make_pairs(directory: Path) -> None:
    """Training and held-out pairs, the same for every run."""
    from dina_reward.shapes import build_pool, load_pipeline, sample_pairs

    directory.mkdir(parents=True, exist_ok=True)
    settings = {"train": (TRAIN_POOL, TRAIN_PAIRS, 0), "held_out": (TEST_POOL, TEST_PAIRS, EVALUATION_SEED)}
    for split, (pool, pairs, seed) in settings.items():
        path = directory / f"{split}.safetensors"
        if not path.is_file():
            made = informative(sample_pairs(build_pool(load_pipeline(), split, pool, seed), split, pairs, seed))
            made.save(path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)


def informative(pairs: Any) -> Any:
    """Those of the pairs whose two latents are of `KINDS`, and whose qualities differ by more than a negligible gap.

    The gap is the oracle's; labels stay as noisy as they are.
    """
    import torch

    from dina_reward.shapes.preferences import NEGLIGIBLE_GAP, SOURCES

    kinds = torch.tensor([SOURCES.index(kind) for kind in KINDS])
    kept = torch.isin(pairs.source[pairs.chosen], kinds) & torch.isin(pairs.source[pairs.rejected], kinds)
    kept &= pairs.gap.abs() > NEGLIGIBLE_GAP
    columns = {name: getattr(pairs, name)[kept] for name in ("chosen", "rejected", "scenes", "gap")}
    return replace(pairs, **columns)


class SingleVotes(Sequence[Any]):
    """Training rows as most datasets have them: what one labeller said of each pair, with his errors."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        return {**self.pairs[index], "p_chosen": 1.0}


def run(name: str, seed: int, output: Path, steps: int, iterations: int) -> None:
    """Trains, evaluates and uses one reward; its figures appear in `result.json` when all is done."""
    from dina_reward.shapes import load_pipeline
    from dina_reward.shapes.alignment import align
    from dina_reward.shapes.preferences import PreferencePairs
    from dina_reward.shapes.reward import train_reward

    variant, directory = VARIANTS[name], output / name / f"seed-{seed}"
    pipeline, started = load_pipeline(), time.perf_counter()
    reward = train_reward(
        pipeline,
        SingleVotes(PreferencePairs.load(output / "pairs" / "train.safetensors")),
        directory / "reward",
        steps=steps,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        seed=seed,
        reward_settings=variant.reward,
        training_settings={"ema_decay": EMA_DECAY, **variant.training},
    )
    trained = time.perf_counter()
    held_out = PreferencePairs.load(output / "pairs" / "held_out.safetensors")
    result: dict[str, Any] = evaluate(reward, list(held_out))
    evaluated = time.perf_counter()
    aligned = align(
        directory / "alignment",
        iterations=iterations,
        evaluate_every=iterations,
        seed=seed,
        reward_path=directory / "reward" / "averaged",
        reward_noise_level=[variant.use_level],
    )
    first, last = aligned.history[0].metrics, aligned.history[-1].metrics
    result["alignment"] = {
        metric: [first[metric], last[metric]] for metric in first if metric in last and metric != "step"
    }
    result["seconds"] = {
        "training": trained - started,
        "evaluation": evaluated - trained,
        "alignment": time.perf_counter() - evaluated,
    }
    (directory / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def evaluate(reward: Any, pairs: Sequence[Any]) -> dict[str, Any]:
    """Accuracy and calibration at every level, and of ensembles in both ways, of one reward."""
    import torch

    from dina_reward.evaluation import PairProtocol, measure_calibration, pairwise_accuracy, score_pairs

    def figures(margins: torch.Tensor, levels: Sequence[float]) -> dict[str, float]:
        sigma = torch.tensor(levels).square().mean().sqrt()
        probability = reward.preference_model.probability(margins, torch.zeros_like(margins), sigma)
        calibration = measure_calibration(probability, labels)
        return {
            "accuracy": pairwise_accuracy(margins, labels).value,
            "ece": calibration.expected_calibration_error,
            "nll": calibration.nll,
            "brier": calibration.brier,
        }

    single = score_pairs(reward, pairs, PairProtocol(LEVELS, None), batch_size=256, progress=False)
    labels, margins = single.p_chosen, dict(zip(LEVELS, single.margins.T, strict=True))
    ensembles: dict[str, dict[str, Any]] = {"mean": {}, "tokens": {}}
    for count, levels in ENSEMBLES.items():
        # All levels of an ensemble see one noise tensor, so the average of single-level scores is the ensemble "mean".
        ensembles["mean"][str(count)] = figures(torch.stack([margins[level] for level in levels]).mean(dim=0), levels)
        if count == 1:
            ensembles["tokens"]["1"] = ensembles["mean"]["1"]
            continue
        scores = score_pairs(reward, pairs, PairProtocol((), levels, "tokens"), batch_size=256, progress=False)
        ensembles["tokens"][str(count)] = figures(scores.margins[:, 0], levels)
    return {
        "pairs": len(pairs),
        "levels": {f"{level:g}": figures(margins[level], (level,)) for level in LEVELS},
        "score_std": {
            f"{level:g}": float(torch.cat([chosen, rejected]).std())
            for level, chosen, rejected in zip(LEVELS, single.chosen.T, single.rejected.T, strict=True)
        },
        "ensembles": ensembles,
    }


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
        "ensembles": {
            kind: {
                count: {
                    "accuracy": spread([100 * r["ensembles"][kind][count]["accuracy"] for r in results]),
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

    def ensembles(row: dict[str, Any], count: str) -> str:
        averaged, tokens = (row["ensembles"][kind][count] for kind in ("mean", "tokens"))
        if count == "1":
            return f"{pm(averaged['accuracy'])} ({averaged['ece'][0]:.3f})"
        both = f"{pm(averaged['accuracy'])} / {pm(tokens['accuracy'])}"
        return f"{both} ({averaged['ece'][0]:.3f} / {tokens['ece'][0]:.3f})"

    by_level = [
        [row["variant"], *(f"{row['accuracy_by_level'][k][0]:.1f} / {row['ece_by_level'][k][0]:.3f}" for k in levels)]
        for row in rows
    ]
    by_count = [[row["variant"], *(ensembles(row, count) for count in counts)] for row in rows]
    aligned = [
        [row["variant"], f"{row['use_level']:g}", pm(row["accuracy_at_use_level"])]
        + [pm(row[gain]) for gain in ("reward_gain", "fit_gain", "cleanness_gain")]
        for row in rows
    ]
    columns = ("variant", "level", "accuracy there (%)", "reward (its own deviations)", "oracle fit", "cleanness")
    return "\n".join(
        [
            "Accuracy (%) by noise level, mean over seeds; after the slash the expected calibration error.\n",
            _table(["variant", *levels], by_level),
            "Ensembles around level .4, average of scores / tokens: accuracy (%) ± deviation over seeds; in brackets the "
            "calibration error.\n",
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

    figure = Figure(figsize=(13, 6.4), layout="constrained")
    accuracy, calibration, ensembles, aligned = figure.subplots(2, 2).flat
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        levels = [float(key) for key in row["accuracy_by_level"]]
        shift = (place - (len(rows) - 1) / 2) * width
        for panel, key in ((accuracy, "accuracy_by_level"), (calibration, "ece_by_level")):
            values, errors = zip(*row[key].values(), strict=True)
            panel.errorbar(
                [level + 0.02 * shift for level in levels], values, errors, fmt="o-", ms=3, lw=1.2, capsize=2,
                color=f"C{place}", label=row["variant"],
            )  # fmt: skip
        for kind, style, filled in (("mean", "o-", True), ("tokens", "s:", False)):
            values, errors = zip(*(found["accuracy"] for found in row["ensembles"][kind].values()), strict=True)
            ensembles.errorbar(
                [position + 0.6 * shift for position in range(len(values))], values, errors, fmt=style, ms=4, lw=1.2,
                capsize=2, color=f"C{place}", mfc=f"C{place}" if filled else "white",
            )  # fmt: skip
        for group, gain in enumerate(("fit_gain", "cleanness_gain")):
            value, error = row[gain]
            aligned.bar(group + shift, value, 0.9 * width, yerr=error, capsize=2, color=f"C{place}")
    accuracy.set(title="accuracy on held-out pairs (%)", xlabel="noise level")
    accuracy.legend(fontsize=8, loc="lower left")
    calibration.set(title="expected calibration error", xlabel="noise level", ylim=(0, None))
    ensembles.set(title="accuracy of ensembles (%): average (filled), tokens (hollow)", xlabel="levels")
    ensembles.set_xticks(range(len(ENSEMBLES)), [f"{n}" for n in ENSEMBLES])
    aligned.set(title="alignment with the reward: change in the oracle's view (points)")
    aligned.set_xticks([0, 1], ["fit", "cleanness"])
    aligned.axhline(0, color="0.3", lw=0.8)
    for panel in (accuracy, calibration, ensembles, aligned):
        panel.grid(alpha=0.3)
        panel.title.set_fontsize(10)
    figure.savefig(path, dpi=110)


def launch(name: str, seed: int, arguments: argparse.Namespace) -> None:
    """One run in a process of its own."""
    directory = arguments.output / name / f"seed-{seed}"
    if (directory / "result.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--output", str(arguments.output), "--one", name, str(seed)]
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
        "--steps", type=int, default=850, help=f"optimizer steps of each reward, {BATCH_SIZE} pairs each"
    )
    parser.add_argument("--iterations", type=int, default=12, help="alignment iterations with each reward")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run(arguments.one[0], int(arguments.one[1]), arguments.output, arguments.steps, arguments.iterations)
        return
    started, names = time.perf_counter(), arguments.only or list(VARIANTS)
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
            json.loads((arguments.output / name / f"seed-{seed}" / "result.json").read_text())
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
        "seconds": time.perf_counter() - started,
        "table": table,
        "runs": runs,
    }
    (arguments.output / "ablation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "ablation.md").write_text(markdown(table), encoding="utf-8")
    draw(table, arguments.output / "ablation.png")
    print(markdown(table))


if __name__ == "__main__":
    main()
