"""One page about a search: the pictures it found, the scores on the way, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dina_reward.alignment.experience.images import still_images
from dina_reward.alignment.monitoring.pictures import picture_grid
from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.search.particles import Check, rows_of
from dina_reward.search.result import SearchResult


_DRAWN_LINEAGES = 8
_MUCH_WIDER = 4
"""Times that scores of some check may reach beyond those of the last one before the axis turns logarithmic there."""


def result_grid(result: SearchResult) -> Image.Image:
    """The pictures of a result with prompts and scores; of videos the frame in the middle. Decodes, if nothing has yet."""
    images = still_images(result.images())
    return picture_grid(list(images), result.prompts, result.scores.tolist())


def cost_lines(result: SearchResult) -> list[tuple[str, str]]:
    """Names and figures of what a search has done and spent."""
    prompts = len(set(result.trace[-1].prompt))
    return [
        ("method", type(result.method).__name__),
        ("prompts", str(prompts)),
        ("budget per prompt", f"{result.budget:g} samples of {result.num_inference_steps} steps"),
        ("rows scored", str(sum(len(check.prompt) for check in result.trace))),
        ("denoiser calls", f"{result.denoiser_calls:,} ({result.denoiser_calls / prompts:g} per prompt)"),
        ("reward calls", f"{result.reward_calls:,}"),
        ("decoder calls", f"{result.decoder_calls:,}"),
        ("seconds", f"{result.seconds:.1f}"),
        ("mean score", f"{float(result.scores.mean()):.4g}"),
    ]


def write_page(result: SearchResult, path: str | Path) -> None:
    """Writes the page as a PNG: pictures, scores of all rows by step with the lineage of what was returned, costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    halves: Any = figure.subfigures(1, 2)
    left, right = halves
    pictures = left.subplots()
    pictures.imshow(np.asarray(result_grid(result)))
    pictures.axis("off")
    scores, costs = right.subplots(2, 1, height_ratios=(2, 1))
    _draw_scores(scores, result)
    costs.axis("off")
    table = costs.table([list(line) for line in cost_lines(result)], loc="center", cellLoc="left", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staging:
        figure.savefig(staging, format="png", dpi=100)


def _draw_scores(axes: Any, result: SearchResult) -> None:
    """Scores above the mean of their prompt at their check, so that prompts and levels can share an axis."""
    heights = [above_prompt_mean(check) for check in result.trace]
    for check, values in zip(result.trace, heights, strict=True):
        kept = set(check.kept)
        colours = ["tab:blue" if row in kept else "0.75" for row in range(len(values))]
        axes.scatter([check.step] * len(values), values, c=colours, s=14, zorder=2)
    for row in range(min(len(result.nodes), _DRAWN_LINEAGES)):
        places = result.places(row)
        steps = [result.trace[number].step for number, _ in places]
        axes.plot(steps, [heights[number][place] for number, place in places], color="tab:blue", alpha=0.6, zorder=1)
    axes.set(xlabel="denoising steps made", ylabel="score above the mean of its prompt", xlim=(0, None))
    reach = [max(map(abs, values), default=0.0) for values in heights]
    if reach[-1] > 0 and max(reach) > _MUCH_WIDER * reach[-1]:
        # Scores of states that are almost noise spread widely, and would press all others onto one line.
        axes.set_yscale("symlog", linthresh=reach[-1], linscale=2)
        axes.set_yticks([sign * reach[-1] * size for sign in (-1, 1) for size in (1, 10)] + [0])
        axes.yaxis.set_major_formatter("{x:.2g}")
        axes.set_ylabel("score above the mean of its prompt\n(logarithmic where early scores spread)")
    axes.set_title("every scored sample: blue went on, grey did not; lines lead to what was returned", fontsize=9)
    axes.grid(alpha=0.3)


def above_prompt_mean(check: Check) -> list[float]:
    """Scores of a check minus the mean over the rows of their prompt, in row order."""
    values = check.scores.clone()
    for rows in rows_of(check.prompt).values():
        values[rows] -= values[rows].mean()
    heights: list[float] = values.tolist()
    return heights
