"""One table over several benchmarks, as papers print it: a row per reward and setting, a column per benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from dina_reward.evaluation.markdown import markdown, percent


@dataclass(frozen=True)
class BenchmarkRow:
    """One reward in one setting on all benchmarks.

    Args:
        reward, setting: names.
        accuracy: by benchmark, in ``[0, 1]``; ``None`` where no pair counts.
        interval: 95 % bootstrap interval of each; ``None`` where there is none.
        average: mean of the accuracies, every benchmark counting alike; ``None`` where one is.
    """

    reward: str
    setting: str
    accuracy: dict[str, float | None]
    interval: dict[str, tuple[float, float] | None]
    average: float | None


def benchmark_rows(comparisons: Mapping[str, Mapping[str, Any]]) -> list[BenchmarkRow]:
    """Rows of the table, in the order of the first benchmark's report.

    Args:
        comparisons: by benchmark, what `Comparison.to_dict` gives or ``evaluation.json`` holds.

    Raises:
        ValueError: no benchmark, or the rewards or settings differ between benchmarks.
    """
    if not comparisons:
        raise ValueError("there is no benchmark to make a table of")
    found = {
        name: {
            (reward["name"], setting): report["accuracy"]
            for reward in comparison["rewards"]
            for setting, report in reward["settings"].items()
        }
        for name, comparison in comparisons.items()
    }
    keys = list(next(iter(found.values())))
    for name, rows in found.items():
        if set(rows) != set(keys):
            different = sorted(" at ".join(key) for key in set(rows) ^ set(keys))
            raise ValueError(
                f"{name} was evaluated with other rewards or settings than the rest: {', '.join(different)}"
            )
    return [_row(key, {name: rows[key] for name, rows in found.items()}) for key in keys]


def benchmark_table(comparisons: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as Markdown; below, the pairs and the tie convention of each benchmark.

    Arguments and errors as for `benchmark_rows`.
    """
    names = list(comparisons)
    cells = [
        [row.reward, row.setting, *(_cell(row.accuracy[n], row.interval[n]) for n in names), _cell(row.average)]
        for row in benchmark_rows(comparisons)
    ]
    notes = [
        f"- {name}: {comparison['pairs']:,} pairs, {comparison['prompts']:,} prompts, tie convention "
        f"{comparison['ties']['name']!r} ({comparison['dataset']})"
        for name, comparison in comparisons.items()
    ]
    table = markdown(("reward", "noise level", *names, "average"), cells)
    heading = "Pairwise accuracy in % with 95 % bootstrap intervals over prompts; the average counts benchmarks alike."
    return "\n\n".join([heading, table, "\n".join(notes)])


def _row(key: tuple[str, str], reports: Mapping[str, Mapping[str, Any]]) -> BenchmarkRow:
    accuracy = {name: report["value"] for name, report in reports.items()}
    interval = {
        name: None if None in (report["interval"] or [None]) else tuple(report["interval"])
        for name, report in reports.items()
    }
    average = None if None in accuracy.values() else mean(accuracy.values())
    return BenchmarkRow(*key, accuracy, interval, average)


def _cell(value: float | None, interval: tuple[float, float] | None = None) -> str:
    return "-" if value is None else percent(value, interval)
