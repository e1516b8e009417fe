"""Does a refreshed reward stay true? Long runs on the embedded world with frozen, cautious and refreshed rewards.

    python recipes/compare_refresh.py --output outputs/refresh --jobs 2

Every run is DiffusionNFT for 180 generations, in a process of its own; the oracle judges 144 held-out prompts
and is never trained on. Refreshes ask a labeller that errs. A run with that judge in the loop shows what it costs to do
without a latent reward: its time is that of the run and a stated time per judgement. A second part distils a judge with a
taste of its own (how high up the shape stands) from zero and aligns with it.

The command can be killed and started again: what is complete is kept. It writes `refresh.json`, `refresh.md`, `refresh.png`
and, of the first seed's samples at the start and at the end, `refresh_samples.png`; `--rehearse` goes through all of it in
miniature.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from dina_reward.alignment.monitoring.hacking import PromptScores, find_reward_hacking
from dina_reward.alignment.monitoring.pictures import grid_tiles
from dina_reward.checkpoints.kept_results import identity, read_result, write_result, write_whole
from dina_reward.checkpoints.locking import sole_owner
from dina_reward.checks.children import in_parallel, run_child
from dina_reward.recipes.arguments import faults_in_one_line


RECIPES = Path(__file__).parent
SAMPLES_PER_GENERATION = 192
ITERATIONS = 180
JUDGE = "dina_reward.shapes.judges:noisy_quality"
FIT_BAR, CALLS_BAR = 0.92, 0.1
THRESHOLDS = (1.0, 1.5, 2.0, 2.5, 3.0)
QUALITY = {"fit": 0.7, "cleanness": 0.3}
"""The oracle's quality, whose highest point is where a run turns."""


@dataclass(frozen=True)
class Entry:
    """One way to treat the reward: fields that differ from ``nft_shapes_refresh``, and its line in the figure."""

    colour: str
    line: str = "-"
    overrides: Mapping[str, Any] = field(default_factory=dict)


FROZEN = {"refresh_judge": "null"}
CAUTIOUS = {"reward_kappa": 1.0, "reward_spread": "draws", "reward_num_noise_samples": 4}
ENTRIES = {
    "frozen": Entry("black", overrides=FROZEN),
    "KL": Entry("0.5", overrides={**FROZEN, "beta_kl": 0.03}),
    "conservative": Entry("tab:green", overrides={**FROZEN, **CAUTIOUS}),
    "head ensemble": Entry(
        "tab:olive",
        overrides={**FROZEN, "reward_model_path": "ENSEMBLE", "reward_kappa": 1.0, "reward_spread": "heads"},
    ),
    "refresh": Entry("tab:red"),
    "refresh, KL": Entry("tab:purple", overrides={"beta_kl": 0.03}),
    "refresh, conservative": Entry("tab:red", "--", CAUTIOUS),
    "judge in the loop": Entry(
        "tab:blue",
        overrides={
            **FROZEN,
            "reward_funcs": JUDGE.replace(":", "."),
            # The latent reward is logged and trains nothing.
            "reward_weights": (0, 1),
        },
    ),
}
"""Name in the table: what is run."""


@dataclass(frozen=True)
class Plan:
    """How long runs are, and how often they are evaluated and refreshed, in generations."""

    iterations: int
    evaluate_every: int = 10
    refresh_every: int = 30
    train_steps: int = 1200
    distill_steps: int = 400
    budget: int = 3000
    extra: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Fields of a run's configuration."""
        steps = 2
        return {
            "max_steps": steps * self.iterations,
            "eval_steps": steps * self.evaluate_every,
            "refresh_every": self.refresh_every,
            "save_strategy": "no",
            "disable_tqdm": "true",
            **self.extra,
        }


def launch(recipe: str, config: str, options: Mapping[str, Any], directory: Path, threads: int) -> dict[str, Any]:
    """Runs a recipe in a process of its own, once; returns what it kept besides its files.

    Raises:
        RuntimeError: it ended badly; the message names its log.
    """
    path = RECIPES / "configs" / f"{config}.yaml"
    settings = identity({"recipe": recipe, **options}, path)
    kept = read_result(directory / "result.json", settings)
    if kept is not None:
        return kept
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    command = [sys.executable, str(RECIPES / f"{recipe}.py"), "--config", str(path), "--output_dir", str(directory)]
    for name, value in options.items():
        command += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    with open(directory / "log.txt", "w", encoding="utf-8") as log:
        code, _ = run_child(command, log, {**os.environ, "OMP_NUM_THREADS": str(threads)})
    if code:
        raise RuntimeError(f"{' '.join(command)} ended with {code}; see {directory / 'log.txt'}")
    result = {"curve": curve(directory)} if (directory / "evaluation_history.jsonl").is_file() else {}
    write_result(directory / "result.json", settings, result)
    return result


def curve(directory: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run: means, costs and the scores of its prompts."""
    history = [json.loads(line) for line in (directory / "evaluation_history.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (directory / "evaluation_scores.jsonl").read_text().splitlines()]
    return [
        {"step": record["step"], **record["metrics"], **record["costs"], "prompts": score}
        for record, score in zip(history, scores, strict=True)
    ]


def run(name: str, seed: int, plan: Plan, output: Path, threads: int) -> dict[str, Any]:
    """One long run."""
    overrides = dict(ENTRIES[name].overrides)
    if overrides.get("reward_model_path") == "ENSEMBLE":
        overrides["reward_model_path"] = str(output / "ensemble")
    options = {**plan.options(), **overrides, "seed": seed}
    return launch("nft", "nft_shapes_refresh", options, place(name, seed, output), threads)


def place(name: str, seed: int, output: Path) -> Path:
    """The directory of a run."""
    return output / name.replace(" ", "-") / f"seed-{seed}"


def train_ensemble(plan: Plan, output: Path, threads: int) -> None:
    """The reward with several heads, trained as the configuration of the shipped world's reward says."""
    options = {"head_members": 4, "max_steps": plan.train_steps, "save_strategy": "no", "eval_strategy": "no"}
    options |= {"warmup_steps": plan.train_steps // 20, "disable_tqdm": "true", "use_cpu": "true"}
    if plan.train_steps < 100:  # a rehearsal
        options |= {"max_train_pairs": 1000, "max_eval_pairs": 100}
    launch("train_reward", "train_reward_shapes", options, output / "ensemble", threads)


def row(name: str, runs: Sequence[dict[str, Any]], seconds_per_judgement: float) -> dict[str, Any]:
    """Figures of one way, a value per seed."""
    curves = [each["curve"] for each in runs]
    in_loop = name == "judge in the loop"
    judged = [points[-1]["reward_calls" if in_loop else "judge_calls"] for points in curves]
    return {
        "name": name,
        "fit": [points[-1]["fit"] for points in curves],
        "fit_before": [points[0]["fit"] for points in curves],
        "best_fit": [max(point["fit"] for point in points) for points in curves],
        "cleanness": [points[-1]["cleanness"] for points in curves],
        "cleanness_before": [points[0]["cleanness"] for points in curves],
        "judgements": judged,
        "judged_share": [calls / points[-1]["reward_calls"] for calls, points in zip(judged, curves, strict=True)],
        "denoiser_calls": [points[-1]["denoiser_calls"] for points in curves],
        "seconds": [points[-1]["train_seconds"] for points in curves],
        "seconds_with_judge": [
            points[-1]["train_seconds"] + seconds_per_judgement * calls
            for calls, points in zip(judged, curves, strict=True)
        ],
    }


def passes(figures: Mapping[str, Any]) -> list[bool]:
    """Whether each seed meets the bar: fit, cleanness no lower than at the start, and few judgements."""
    columns = (figures[name] for name in ("fit", "cleanness", "cleanness_before", "judged_share"))
    return [
        fit >= FIT_BAR and clean >= before and share <= CALLS_BAR
        for fit, clean, before, share in zip(*columns, strict=True)
    ]


def equal_time(curve_: Sequence[dict[str, Any]], judged: str, each: float, seconds: float) -> dict[str, Any]:
    """The last evaluation of a run that came within so many seconds, judgements included."""
    within = [point for point in curve_ if point["train_seconds"] + each * point[judged] <= seconds]
    return within[-1] if within else curve_[0]


def operating_curve(results: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The alarm at several thresholds: evaluations between its first going off and the run's best one; and false alarms.

    A run that ends within a standard error of its best evaluation is sane: an alarm there is a false one.
    """
    rows = []
    for threshold in THRESHOLDS:
        leads, missed, false, sane = [], 0, 0, 0
        for each in (run_ for runs in results.values() for run_ in runs):
            points = each["curve"]
            quality = [sum(w * point[name] for name, w in QUALITY.items()) for point in points]
            best = quality.index(max(quality))
            scores = [PromptScores(**point["prompts"]) for point in points]
            fired = [n for n in range(len(scores)) if find_reward_hacking(scores[: n + 1], threshold=threshold)]
            if max(quality) - quality[-1] < 0.01:
                sane += 1
                false += bool(fired)
            elif fired:
                leads.append(fired[0] - best)
            else:
                missed += 1
        turned = len(leads) + missed
        rows.append(
            {"threshold": threshold, "turned": turned, "missed": missed, "sane": sane, "false": false, "delay": leads}
        )
    return rows


def new_taste(plan: Plan, seeds: Sequence[int], output: Path, threads: int) -> list[dict[str, Any]]:
    """A judge that no shipped reward knows: distilled from zero, then aligned with."""
    results = []
    for seed in seeds:
        directory = output / "taste" / f"seed-{seed}"
        steps = {"max_steps": plan.distill_steps, "warmup_steps": plan.distill_steps // 20, "budget": plan.budget}
        options = {**steps, "seed": seed, "save_strategy": "no", "disable_tqdm": "true"}
        launch("distill_reward", "distill_shapes", options, directory / "reward", threads)
        stored = json.loads((directory / "reward" / "distillation.json").read_text())
        alignment = {**plan.options(), **FROZEN, "max_steps": min(plan.options()["max_steps"], 90), "seed": seed}
        alignment |= {"reward_model_path": str(directory / "reward")}
        alignment |= {"eval_reward_funcs": "dina_reward.shapes.judges.in_upper_half"}
        points = launch("nft", "nft_shapes_refresh", alignment, directory / "aligned", threads)["curve"]
        results.append(
            {
                "judgements": stored["labels"]["calls"] + stored["eval_labels"]["calls"],
                "accuracy": stored["evaluation"]["accuracy"]["0.4"]["value"],
                "cost_ratio": stored["cost_ratio"],
                "before": points[0]["in_upper_half"],
                "after": points[-1]["in_upper_half"],
            }
        )
    return results


def markdown(rows: Sequence[dict[str, Any]], alarm: Sequence[dict[str, Any]], taste: Sequence[dict[str, Any]]) -> str:
    """The tables as they stand in the documentation."""

    def per_seed(values: Sequence[float], form: str = ".3f") -> str:
        return ", ".join(f"{value:{form}}" for value in values)

    lines = [
        "| reward | oracle fit at the end | cleanness (start) | judgements | of the loop | seconds with judge | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        met = passes(each)
        lines.append(
            f"| {each['name']} | {per_seed(each['fit'])} | {per_seed(each['cleanness'])} "
            f"({mean(each['cleanness_before']):.3f}) | {mean(each['judgements']):,.0f} | "
            f"{100 * mean(each['judged_share']):.1f} % | {mean(each['seconds_with_judge']):,.0f} | {sum(met)}/{len(met)} |"
        )
    lines += ["", "| alarm at | runs that turned | missed | evaluations after the best | sane runs | false alarms |"]
    lines += ["|---|---|---|---|---|---|"]
    for each in alarm:
        delay = f"{mean(each['delay']):+.1f}" if each["delay"] else "-"
        lines.append(
            f"| {each['threshold']:g} standard errors | {each['turned']} | {each['missed']} | {delay} | {each['sane']} | "
            f"{each['false']} |"
        )
    if taste:
        lines += [
            "",
            "| judge: height of the shape | judgements | accuracy at .4 | in the upper half |",
            "|---|---|---|---|",
        ]
        for number, each in enumerate(taste):
            change = f"{100 * each['before']:.0f} → {100 * each['after']:.0f} %"
            lines.append(f"| seed {number} | {each['judgements']:,} | {each['accuracy']:.3f} | {change} |")
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Fit and cleanness over denoiser calls: means over seeds, and every seed in a thin line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    for panel, metric in zip(figure.subplots(1, 2), ("fit", "cleanness"), strict=True):
        for name, runs in results.items():
            entry = ENTRIES[name]
            count = min(len(each["curve"]) for each in runs)
            for each in runs:
                points = each["curve"][:count]
                panel.plot(
                    [p["denoiser_calls"] for p in points], [p[metric] for p in points], color=entry.colour, alpha=0.2
                )
            x = [mean(each["curve"][n]["denoiser_calls"] for each in runs) for n in range(count)]
            y = [mean(each["curve"][n][metric] for each in runs) for n in range(count)]
            panel.plot(x, y, color=entry.colour, linestyle=entry.line, label=name)
        panel.set_xlabel("denoiser calls")
        panel.set_ylabel(f"oracle {metric}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def draw_samples(names: Sequence[str], seed: int, plan: Plan, output: Path, path: Path) -> None:
    """One row for the start and one for the end of each run of a seed: the same held-out prompts and noise everywhere.

    Shown are the first prompts of the evaluation that ask for each shape, as in the demo: no picture is chosen.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    from dina_reward.shapes.alignment import EVALUATION_IMAGES, held_out_prompts
    from dina_reward.shapes.tiles import draw_tile, shown_prompts, two_lines

    images = plan.extra.get("eval_num_images", EVALUATION_IMAGES)
    prompts = held_out_prompts()[:images]
    shown = shown_prompts(prompts)
    runs = {name: sorted((place(name, seed, output) / "pictures").glob("step-*.png")) for name in names}
    rows = {"start": runs[names[0]][0], **{name: pictures[-1] for name, pictures in runs.items()}}
    figure = Figure(figsize=(1.6 * len(shown), 2.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for row, (name, picture) in enumerate(rows.items()):
        tiles = grid_tiles(Image.open(picture), images)
        for column, number in enumerate(shown):
            draw_tile(axes[row, column], tiles[number], prompts[number])
        axes[row, 0].set_ylabel(name, fontsize=12)
    for column, number in enumerate(shown):
        axes[0, column].set_title(two_lines(prompts[number]), fontsize=8, fontweight="bold")
    figure.savefig(path, dpi=80, bbox_inches="tight")


def compare(names: Sequence[str], seeds: Sequence[int], plan: Plan, output: Path, jobs: int, each: float) -> None:
    """Everything, and the files."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    if any(ENTRIES[name].overrides.get("reward_model_path") == "ENSEMBLE" for name in names):
        train_ensemble(plan, output, threads)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    places = [(name, seed) for seed in seeds for name in names]
    runs = in_parallel([partial(run, name, seed, plan, output, threads) for name, seed in places], jobs, "runs")
    for (name, _), result in zip(places, runs, strict=True):
        results[name].append(result)
    taste = new_taste(plan, seeds, output, threads)
    rows = [row(name, runs, each) for name, runs in results.items()]
    alarm = operating_curve(results)
    table = markdown(rows, alarm, taste)
    content = {"rows": rows, "alarm": alarm, "taste": taste, "seconds_per_judgement": each}
    if {"refresh", "judge in the loop"} <= results.keys():
        content["equal_time"] = at_equal_time(results, each)
        table += f"\n{content['equal_time']['text']}\n"
    write_whole(output / "refresh.json", json.dumps(content, indent=1) + "\n")
    write_whole(output / "refresh.md", table)
    draw(results, output / "refresh.png")
    draw_samples(names, seeds[0], plan, output, output / "refresh_samples.png")
    print(table)


def at_equal_time(results: Mapping[str, Sequence[dict[str, Any]]], each: float) -> dict[str, Any]:
    """The judge in the loop when it has had the time that the refreshed run took."""
    fits = []
    for refreshed, looped in zip(results["refresh"], results["judge in the loop"], strict=True):
        last = refreshed["curve"][-1]
        seconds = last["train_seconds"] + each * last["judge_calls"]
        fits.append((last["fit"], equal_time(looped["curve"], "reward_calls", each, seconds)["fit"]))
    text = (
        f"At equal time, {1000 * each:.0f} ms for a judgement: fit {mean(fit for fit, _ in fits):.3f} with refreshes, "
    )
    return {"fits": fits, "text": f"{text}{mean(fit for _, fit in fits):.3f} with the judge in the loop."}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare frozen, cautious and refreshed rewards on long runs.")
    parser.add_argument("--output", type=Path, default=Path("outputs/refresh"), help="directory of runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs of each entry")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="generations of 192 samples of each run")
    parser.add_argument(
        "--entries", nargs="+", default=list(ENTRIES), choices=list(ENTRIES), metavar="NAME", help="which"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--seconds-per-judgement", type=float, default=0.05, help="what a judgement is taken to cost")
    parser.add_argument("--rehearse", action="store_true", help="everything in miniature, to see that it works")
    arguments = parser.parse_args()
    plan = Plan(arguments.iterations)
    if arguments.rehearse:
        small = {"per_device_train_batch_size": 24, "max_eval_prompts": 12, "eval_num_images": 4, "lora_rank": 4}
        small |= {"refresh_budget": 24, "refresh_audit_budget": 16, "refresh_steps": 2, "num_generations": 6}
        plan = Plan(4, 2, 2, train_steps=4, distill_steps=4, budget=80, extra={**small, "num_inference_steps": 3})
    settings = (arguments.seeds, plan, arguments.output, arguments.jobs, arguments.seconds_per_judgement)
    faults_in_one_line()
    with sole_owner(arguments.output):
        compare(arguments.entries, *settings)


if __name__ == "__main__":
    main()
