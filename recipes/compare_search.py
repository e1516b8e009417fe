"""Search methods on the embedded world at equal denoiser calls: which finds the better samples, and where it goes too far.

    python recipes/compare_search.py --output outputs/search --jobs 2    # about 25 core-minutes, restartable

Every method of `dina_reward.search` searches held-out prompts with the shipped latent rewards, on the flow-matching and on
the DDPM generator, with several seeds, at budgets of 4, 8, 16 and 32 samples' denoiser calls; best-of-N, halving and
stepwise selection also search on a flow-matching generator that was aligned with its reward. The oracle judges what they
find, and never what they search by.
With `--pixel-reward`, a directory that `recipes/compare_pixel_reward.py` has trained, a reward that must decode takes part.
Every job is a process of its own; the command can be killed and started again: jobs that are complete are kept. It writes
`search.json`, `search.md`, `search.png` and `search_samples.png` to the output, and prints the tables and what comes of the
claims.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dina_reward.checkpoints.kept_results import write_whole
from dina_reward.checkpoints.locking import sole_owner
from dina_reward.recipes.arguments import faults_in_one_line
from dina_reward.shapes.jobs import RESULT_NAME, Job, run_jobs
from dina_reward.shapes.search_comparison import BUDGETS, DEAR, EARLY, GENERATORS, METHODS, STEPS


MODULE, PICTURES = "dina_reward.shapes.search_comparison", "dina_reward.shapes.search_pictures"
BASELINE = "best_of_n"
EARLY_OF = 8
EARLY_GAP, EARLY_SHARE, GAIN = 0.01, 0.6, 3.0
"""Claims: early halving loses at most this oracle fit to the best of eight, at this share of its calls; the best method
gains so many points over best-of-N at equal calls in every seed."""


def jobs_of(arguments: argparse.Namespace) -> list[list[Job]]:
    """Two rounds: the alignment beside the shipped generators; what needs its result."""
    output = arguments.output
    common = [
        "--output",
        output,
        "--prompts",
        arguments.prompts,
        "--budgets",
        *arguments.budgets,
        "--pool",
        arguments.pool,
    ]
    if arguments.pixel_reward is not None:
        common += ["--pixel-reward", arguments.pixel_reward]

    def of(generator: str) -> list[Job]:
        return [
            Job(["-m", MODULE, generator, "--seed", seed, *common], output / generator / f"seed-{seed}" / RESULT_NAME)
            for seed in arguments.seeds
        ]

    shipped = [name for name in arguments.generators if name != "aligned"]
    first = [job for name in shipped for job in of(name)]
    first.append(Job(["-m", PICTURES, "--output", output], output / "pictures" / RESULT_NAME))
    if arguments.variants:
        first += [
            Job(["-m", MODULE, name, "--variants", *common], output / name / "variants" / RESULT_NAME)
            for name in shipped
        ]
    if "aligned" not in arguments.generators:
        return [first]
    words = ["-m", MODULE, "align", "--iterations", arguments.iterations, "--output", output]
    return [[Job(words, output / "alignment" / RESULT_NAME), *first], of("aligned")]


def read_results(output: Path, generators: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Figures of all jobs, one per seed, by generator."""

    def read(name: str, seed: int) -> Any:
        return json.loads((output / name / f"seed-{seed}" / RESULT_NAME).read_text(encoding="utf-8"))

    return {name: [read(name, seed) for seed in seeds] for name in generators}


def best_of(run: dict[str, Any], metric: str, count: int) -> float:
    """What is expected of the best of so many samples of a run's pool."""
    value: float = run["pool"][metric][run["pool"]["sizes"].index(count)]
    return value


def methods_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the methods of a generator's runs, best-of-N first."""
    return [BASELINE, *runs[0]["methods"]]


def value_of(run: dict[str, Any], method: str, budget: int, metric: str) -> float | None:
    """A figure of one run; ``None`` where the method has none at this budget."""
    if method == BASELINE:
        return best_of(run, metric, budget) if metric in run["pool"] and budget in run["pool"]["sizes"] else None
    found: float | None = run["methods"][method].get(str(budget), {}).get(metric)
    return found


def figures_of(run: dict[str, Any], method: str, budget: int) -> dict[str, Any] | None:
    """All figures of one run at a budget; of best-of-N, which is read from the pool, those that it has."""
    if method != BASELINE:
        found: dict[str, Any] | None = run["methods"][method].get(str(budget))
        return found
    pool = run["pool"]
    if budget not in pool["sizes"]:
        return None
    expected = {metric: best_of(run, metric, budget) for metric in ("fit", "cleanness", "score")}
    calls = {"denoiser_calls": STEPS * budget, "reward_calls": budget, "decoder_calls": 0}
    return {**expected, **calls, "cpu_seconds": pool["cpu_seconds_per_sample"] * budget}


def fit_table(runs: Sequence[dict[str, Any]], budgets: Sequence[int]) -> str:
    """Oracle fit of every method at every budget, mean over seeds, and what it gains over best-of-N in each seed."""
    random = mean(best_of(run, "fit", 1) for run in runs)
    heads = " | ".join(f"{budget} samples" for budget in budgets)
    lines = [f"Oracle fit; one random sample: {random:.3f}. In brackets points over best-of-N, per seed.\n"]
    lines += [f"| method | {heads} |", "|---" * (len(budgets) + 1) + "|"]
    for method in methods_of(runs):
        lines.append(f"| {method} | {' | '.join(_fit_cell(runs, method, budget) for budget in budgets)} |")
    return "\n".join(lines) + "\n"


def _fit_cell(runs: Sequence[dict[str, Any]], method: str, budget: int) -> str:
    values = [value_of(run, method, budget, "fit") for run in runs]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    if method == BASELINE:
        return f"{mean(known):.3f}"
    gains = gains_of(runs, method, budget)
    return f"{mean(known):.3f} ({', '.join(f'{gain:+.1f}' for gain in gains)})"


def gains_of(runs: Sequence[dict[str, Any]], method: str, budget: int) -> list[float]:
    """Points of oracle fit over best-of-N at equal denoiser calls, per seed; empty where either is missing."""
    pairs = [(value_of(run, method, budget, "fit"), value_of(run, BASELINE, budget, "fit")) for run in runs]
    return [100 * (own - base) for own, base in pairs if own is not None and base is not None]


def cost_table(runs: Sequence[dict[str, Any]], budget: int) -> str:
    """What every method takes and gives at one budget, per prompt."""
    columns = {
        "fit": ".3f",
        "cleanness": ".3f",
        "score": ".2f",
        "diversity": ".3f",
        "denoiser_calls": ".0f",
        "reward_calls": ".0f",
        "decoder_calls": ".0f",
        "cpu_seconds": ".3f",
        "peak_memory_mb": ".0f",
    }
    names = [column.replace("_", " ") for column in columns]
    lines = [
        f"At a budget of {budget} samples, per prompt:\n",
        f"| method | {' | '.join(names)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method in methods_of(runs):
        figures = [figures_of(run, method, budget) for run in runs]
        known = [figure for figure in figures if figure is not None]
        if known:
            cells = [
                f"{mean(figure[column] for figure in known):{form}}" if column in known[0] else ""
                for column, form in columns.items()
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    figures = [run[EARLY] for run in runs]
    cells = [f"{mean(figure[column] for figure in figures):{form}}" for column, form in columns.items()]
    lines.append(f"| {EARLY} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def claims(runs: Sequence[dict[str, Any]], budgets: Sequence[int]) -> dict[str, Any]:
    """Is early halving as good as selection at the end, what beats best-of-N, and when does the oracle fall."""
    early = [run[EARLY] for run in runs]
    gaps = [best_of(run, "fit", EARLY_OF) - figure["fit"] for run, figure in zip(runs, early, strict=True)]
    share = early[0]["denoiser_calls"] / (EARLY_OF * STEPS)
    ranked = []
    for method in methods_of(runs)[1:]:
        for budget in budgets:
            gains = gains_of(runs, method, budget)
            if len(gains) == len(runs):
                ranked.append((min(gains), method, budget, gains))
    best = max(ranked, default=(0.0, "", 0, []))
    return {
        "sooner": sooner(runs, best[1], budgets) if best[1] else None,
        "early_gap": mean(gaps),
        "early_share": share,
        "early_holds": mean(gaps) <= EARLY_GAP and share <= EARLY_SHARE,
        "best_method": best[1],
        "best_budget": best[2],
        "best_gains": best[3],
        "best_holds": best[0] >= GAIN,
        "peak": peak_of(runs),
    }


def sooner(runs: Sequence[dict[str, Any]], method: str, budgets: Sequence[int]) -> int | None:
    """The least budget at which a method finds as much as the best of eight; ``None`` if none is enough."""
    aim = mean(best_of(run, "fit", EARLY_OF) for run in runs)
    for budget in sorted(budgets):
        values = [value_of(run, method, budget, "fit") for run in runs]
        known = [value for value in values if value is not None]
        if len(known) == len(values) and mean(known) >= aim:
            return budget
    return None


def peak_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where the oracle's fit of best-of-N is highest, and whether it falls after that by more than a standard error."""
    sizes = runs[0]["pool"]["sizes"]
    fits = [mean(run["pool"]["fit"][place] for run in runs) for place in range(len(sizes))]
    error = mean(run["pool"]["fit_error"][-1] for run in runs) / len(runs) ** 0.5
    place = fits.index(max(fits))
    return {
        "n": sizes[place],
        "fit": fits[place],
        "last_n": sizes[-1],
        "last_fit": fits[-1],
        "falls": fits[place] - fits[-1] > error,
    }


def claim_lines(name: str, facts: dict[str, Any]) -> str:
    """The claims in words."""
    peak, held = facts["peak"], {True: "holds", False: "does not hold"}
    gains = ", ".join(f"{gain:+.1f}" for gain in facts["best_gains"])
    fall = "falls after that" if peak["falls"] else "does not fall"
    sooner_than = (
        f"as much as the best of {EARLY_OF} with the calls of {facts['sooner']}" if facts["sooner"] else "less"
    )
    return "\n".join(
        [
            f"- {name}: halving among {EARLY_OF} is {facts['early_gap']:+.3f} from the best of {EARLY_OF} in oracle fit, at "
            f"{100 * facts['early_share']:.0f} % of its denoiser calls: {held[facts['early_holds']]}.",
            f"- {name}: at equal calls {facts['best_method']} at {facts['best_budget']} samples gains {gains} points over "
            f"best-of-N: {held[facts['best_holds']]}. It finds {sooner_than}.",
            f"- {name}: best-of-N reaches oracle fit {peak['fit']:.3f} at N = {peak['n']} and {peak['last_fit']:.3f} at "
            f"N = {peak['last_n']}; it {fall}.",
        ]
    )


def markdown(results: dict[str, list[dict[str, Any]]], budgets: Sequence[int]) -> str:
    """All tables, with the claims first."""
    parts = [claim_lines(name, claims(runs, budgets)) for name, runs in results.items()]
    for name, runs in results.items():
        shown = 8 if 8 in budgets else budgets[-1]
        parts.append(f"### {name}\n\n{fit_table(runs, budgets)}\n{cost_table(runs, shown)}")
    return "\n".join(parts) + "\n"


def variants_table(output: Path, generators: Sequence[str]) -> str:
    """Oracle fit, cleanness and score of other settings, by generator; empty where they were not run."""
    lines = []
    for name in generators:
        path = output / name / "variants" / RESULT_NAME
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        lines += [
            f"### Settings on {name}, budget {found['budget']}\n",
            "| settings | fit | cleanness | score | denoiser calls |",
            "|---|---|---|---|---|",
        ]
        for setting, figure in found["methods"].items():
            lines.append(
                f"| {setting} | {figure['fit']:.3f} ± {figure['fit_error']:.3f} | {figure['cleanness']:.3f} | "
                f"{figure['score']:.2f} | {figure['denoiser_calls']:.0f} |"
            )
    return "\n".join(lines) + "\n" if lines else ""


def draw(results: dict[str, list[dict[str, Any]]], budgets: Sequence[int], path: Path) -> None:
    """Oracle fit over denoiser calls and over CPU seconds, method by method, and what best-of-N does to cleanness."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results), 12), layout="constrained")
    axes = figure.subplots(3, len(results), squeeze=False)
    for column, (name, runs) in enumerate(results.items()):
        _draw_methods(axes[0, column], name, runs, budgets)
        _draw_methods(axes[1, column], name, runs, budgets, over="cpu_seconds")
        _draw_pool(axes[2, column], name, runs)
    for row in axes:
        row[0].legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def _draw_methods(
    panel: Any, name: str, runs: Sequence[dict[str, Any]], budgets: Sequence[int], over: str = "denoiser_calls"
) -> None:
    order = [*METHODS, *DEAR]  # a method has one colour in all panels
    for method in methods_of(runs):
        points = []
        for budget in (1, *budgets) if method == BASELINE else budgets:
            figures = [found for run in runs if (found := figures_of(run, method, budget)) is not None]
            x = budget if over == "denoiser_calls" else mean(found[over] for found in figures) if figures else 0
            points += [(x, mean(found["fit"] for found in figures))] if len(figures) == len(runs) else []
        if not points:
            continue
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=method, **_style(method, order))
    panel.set(title=name, xlabel=f"{over.replace('_', ' ')} per prompt", ylabel="oracle fit", xscale="log")
    if over == "denoiser_calls":
        panel.set(xlabel="denoiser calls (samples)")
        panel.set_xticks([1, *budgets], [str(budget) for budget in (1, *budgets)])
    panel.grid(alpha=0.3)


def _style(method: str, order: Sequence[str]) -> dict[str, Any]:
    if method == BASELINE:
        return {"color": "black", "linewidth": 2.2}
    if method in order:
        return {"color": f"C{order.index(method)}", "linewidth": 1.3}
    return {"color": "0.55", "linewidth": 1.3, "linestyle": "--" if BASELINE in method else ":"}  # the pixel reward's


def _draw_pool(panel: Any, name: str, runs: Sequence[dict[str, Any]]) -> None:
    sizes = runs[0]["pool"]["sizes"]
    for metric in ("fit", "cleanness"):
        values = [mean(run["pool"][metric][place] for run in runs) for place in range(len(sizes))]
        panel.plot(sizes, values, marker="o", markersize=3, label=f"oracle {metric}")
    panel.set(title=f"{name}: best of N by the reward", xlabel="N", xscale="log")
    panel.grid(alpha=0.3)


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Compare search methods on the embedded world at equal denoiser calls."
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/search"), help="directory of jobs and tables")
    parser.add_argument("--generators", nargs="+", choices=GENERATORS, default=list(GENERATORS), help="what to search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the searches")
    parser.add_argument("--jobs", type=int, default=2, help="jobs at the same time; they share the cores")
    parser.add_argument("--prompts", type=int, default=12, help="different prompts, each searched twice")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="in whole samples per prompt")
    parser.add_argument("--pool", type=int, default=64, help="samples per prompt for the curve of best-of-N")
    parser.add_argument("--iterations", type=int, default=15, help="of the alignment, 192 samples each")
    parser.add_argument("--variants", action="store_true", help="also other settings of the methods")
    parser.add_argument("--pixel-reward", type=Path, help="directory of a trained pixel reward")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parsed(words)
    least = max(EARLY_OF, *arguments.budgets)
    if arguments.pool < least:
        raise SystemExit(f"--pool must be at least {least}, because best-of-N is read from it")
    faults_in_one_line()
    with sole_owner(arguments.output):
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """All jobs and tables."""
    print(f"jobs and tables: {arguments.output}")
    for batch in jobs_of(arguments):
        run_jobs(batch, arguments.jobs)
    results = read_results(arguments.output, arguments.generators, arguments.seeds)
    report = {
        "made": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "prompts": arguments.prompts,
        "seeds": arguments.seeds,
        "claims": {name: claims(runs, arguments.budgets) for name, runs in results.items()},
        "results": results,
    }
    tables = markdown(results, arguments.budgets) + variants_table(arguments.output, arguments.generators)
    write_whole(arguments.output / "search.json", json.dumps(report, indent=1) + "\n")
    write_whole(arguments.output / "search.md", tables)
    draw(results, arguments.budgets, arguments.output / "search.png")
    print(tables)


if __name__ == "__main__":
    main()
