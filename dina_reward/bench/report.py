"""What was measured: rows, ratios between them, an iteration put together from them; as table, JSON and picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dina_reward.bench.machine import Machine
from dina_reward.bench.rows import CALL, DECODE, GRADIENT, IMAGE_TOWER, SCORE, Row
from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.evaluation.markdown import markdown


COLUMNS = ("what", "ms", "+/-", "samples/s", "GFLOP", "GFLOP/s", "% rate", "% roof", "GiB")
"""Median and half the distance of the quartiles ("?" where a slow call was made once); FLOPs of a call; shares of the rate
of matrix products and of the roofline; peak memory."""


@dataclass(frozen=True)
class Iteration:
    """One iteration of Flow-GRPO on one sample, put together from measured rows, without guidance.

    Args:
        steps: denoiser calls of the rollout.
        train_steps: losses with gradient.
        rollout, reward, update: seconds per sample.
    """

    steps: int
    train_steps: int
    rollout: float
    reward: float
    update: float

    @property
    def reward_share(self) -> float:
        """Share of the reward in an iteration."""
        return self.reward / (self.rollout + self.reward + self.update)


@dataclass(frozen=True)
class BenchReport:
    """A finished measurement.

    Args:
        model, weights: what was measured, and whether its weights were random or loaded.
        height, width: of the images in pixels.
        machine: the device and its roofs.
        rows: in the order in which they were measured.
        failed: rows that could not be measured (mostly for want of memory), with the reason.
        steps, train_steps: of the iteration.
    """

    model: str
    weights: str
    height: int
    width: int
    machine: Machine
    rows: tuple[Row, ...]
    failed: dict[str, str]
    steps: int
    train_steps: int

    @property
    def iteration(self) -> Iteration | None:
        """An iteration from the largest batch that all its parts were measured at; ``None`` where there is none."""
        parts = [
            {row.batch: row.seconds / row.batch for row in self._rows(*which)}
            for which in ((CALL, ""), (SCORE, "shared"), (GRADIENT, ""))
        ]
        shared = set.intersection(*(set(part) for part in parts))
        if not shared:
            return None
        call, score, gradient = (part[max(shared)] for part in parts)
        return Iteration(self.steps, self.train_steps, self.steps * call, score, self.train_steps * gradient)

    @property
    def ratios(self) -> dict[str, float]:
        """Of medians, within this run, at the largest batch that both have."""
        found = {
            "three levels / one, standalone": self._ratio(SCORE, "standalone", over=lambda row: row.levels == 3),
            "three levels / one, shared": self._ratio(SCORE, "shared", over=lambda row: row.levels == 3),
            "compiled / eager, standalone": self._ratio(SCORE, "standalone", over=lambda row: row.compiled, levels=1),
            "shared / standalone": self._between((SCORE, "shared"), (SCORE, "standalone")),
            "decode and CLIP-H / score": _sum(
                self._between((DECODE, ""), (SCORE, "standalone")),
                self._between((IMAGE_TOWER, ""), (SCORE, "standalone")),
            ),
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def exponent(self) -> float | None:
        """``p`` of ``seconds ~ batch^p`` for standalone scores, by least squares; ``None`` below three batch sizes."""
        points = [(math.log(row.batch), math.log(row.seconds)) for row in self._rows(SCORE, "standalone")]
        if len(points) < 3:
            return None
        x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
        return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)

    def table(self) -> str:
        """All rows in Markdown."""
        return markdown(COLUMNS, [_cells(row) for row in self.rows])

    def save(self, directory: str | Path) -> tuple[Path, Path]:
        """Writes ``bench-<model>-<device>-<dtype>.json`` and the picture of the same name; gives their paths."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        name = "-".join(("bench", _plain(self.model), _plain(self.machine.device), self.machine.dtype))
        with atomic_file(directory / f"{name}.json") as path:
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        with atomic_file(directory / f"{name}.png") as path:
            self.draw(path)
        return directory / f"{name}.json", directory / f"{name}.png"

    def to_dict(self) -> dict[str, Any]:
        """As the JSON has it."""
        iteration = self.iteration
        return {
            **asdict(self),
            "ratios": self.ratios,
            "exponent": self.exponent,
            "iteration": None if iteration is None else {**asdict(iteration), "reward_share": iteration.reward_share},
        }

    def draw(self, path: Path) -> None:
        """One bar for each row: FLOP/s attained, and beside it a mark at what the roofline allows."""
        from matplotlib.figure import Figure

        rows = [row for row in self.rows if row.flops]
        figure = Figure(figsize=(9, 1.4 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots()
        attained = [row.flops / row.seconds / 1e9 for row in rows]
        places = range(len(rows))
        axes.barh(places, attained, color="#20639b", label="attained")
        allowed = [value / row.roof_share for value, row in zip(attained, rows, strict=True)]
        axes.plot(allowed, places, "|", color="#c8553d", ms=12, mew=2, label="roofline, weights read once per call")
        axes.axvline(self.machine.matrix_rate / 1e9, color="0.4", linestyle=":", label="rate of matrix products")
        axes.set_yticks(places, [row.name for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set(xlabel="GFLOP/s", title=f"{self.model}, {self.machine.dtype}, {self.machine.device}")
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=120, format="png")

    def _rows(self, what: str, mode: str, levels: int = 1) -> list[Row]:
        return [r for r in self.rows if (r.what, r.mode, r.levels, r.compiled) == (what, mode, levels, False)]

    def _ratio(self, what: str, mode: str, over: Callable[[Row], bool], levels: int | None = None) -> float | None:
        top = {
            row.batch: row.seconds
            for row in self.rows
            if (row.what, row.mode) == (what, mode) and over(row) and (levels is None or row.levels == levels)
            if levels is not None or not row.compiled
        }
        return _at_largest(top, {row.batch: row.seconds for row in self._rows(what, mode)})

    def _between(self, first: tuple[str, str], second: tuple[str, str]) -> float | None:
        top, bottom = ({row.batch: row.seconds for row in self._rows(*which)} for which in (first, second))
        return _at_largest(top, bottom)


def _at_largest(top: dict[int, float], bottom: dict[int, float]) -> float | None:
    shared = top.keys() & bottom.keys()
    return top[max(shared)] / bottom[max(shared)] if shared else None


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def _cells(row: Row) -> Sequence[str]:
    return (
        row.name,
        f"{1e3 * row.seconds:,.1f}",
        "?" if row.spread is None else f"{1e3 * row.spread:,.1f}",
        f"{row.samples_per_second:,.1f}",
        f"{row.flops / 1e9:,.2f}",
        f"{row.flops / row.seconds / 1e9:,.1f}",
        f"{100 * row.rate_share:.1f}",
        f"{100 * row.roof_share:.1f}",
        f"{row.peak_memory / 2**30:.2f}",
    )


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
