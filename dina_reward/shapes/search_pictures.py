"""What searches find for the prompts of the demo's picture, at equal denoiser calls, as one figure.

``python -m dina_reward.shapes.search_pictures --output outputs/search``; `recipes/compare_search.py` runs it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dina_reward.search import SearchResult, search
from dina_reward.shapes.alignment import EVALUATION_IMAGES, held_out_prompts
from dina_reward.shapes.jobs import write_result
from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.search_comparison import BATCH_SIZE, STEPS
from dina_reward.shapes.shipped import load_pipeline, load_reward
from dina_reward.shapes.text import MAX_PROMPT_TOKENS
from dina_reward.shapes.tiles import draw_tile, shown_prompts, two_lines


PICTURE_NAME = "search_samples.png"
BUDGET = 8
ROWS = (("one sample", "best_of_n", 1), (f"best of {BUDGET}", "best_of_n", BUDGET), ("stepwise", "stepwise", BUDGET))
"""Label, method, and denoiser calls in samples per prompt."""


def found(prompts: list[str], method: str, budget: int, seed: int) -> SearchResult:
    """One sample per prompt."""
    pipeline = load_pipeline()
    return search(
        pipeline,
        load_reward(pipeline=pipeline, share_backbone=True),
        prompts,
        method=method,
        budget=budget,
        num_inference_steps=STEPS,
        max_sequence_length=MAX_PROMPT_TOKENS,
        batch_size=BATCH_SIZE,
        seed=seed,
    )


def draw(path: Path, seed: int = 0) -> list[float]:
    """Draws a row of samples per method, two prompts of each shape.

    Returns:
        The oracle's fit of each row.
    """
    from diffusers.image_processor import VaeImageProcessor
    from matplotlib.figure import Figure

    held_out = held_out_prompts()[:EVALUATION_IMAGES]
    prompts = [held_out[number] for number in shown_prompts(held_out)]
    figure = Figure(figsize=(13, 6.9), layout="constrained")
    axes = figure.subplots(len(ROWS), len(prompts))
    fits = []
    for row, (label, method, budget) in enumerate(ROWS):
        result = found(prompts, method, budget, seed)
        images = result.images()
        fits.append(float(Oracle()(images, prompts).fit.mean()))
        tiles = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))
        for column, (tile, prompt) in enumerate(zip(tiles, prompts, strict=True)):
            draw_tile(axes[row, column], tile, prompt)
        calls = result.denoiser_calls // len(prompts)
        axes[row, 0].set_ylabel(f"{label}\n{calls} calls\nfit {fits[-1]:.2f}", fontsize=12)
    for column, prompt in enumerate(prompts):
        axes[0, column].set_title(two_lines(prompt), fontsize=9, fontweight="bold")
    figure.savefig(path, dpi=100)
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what searches find at equal denoiser calls.")
    parser.add_argument("--output", type=Path, required=True, help="directory of the picture")
    parser.add_argument("--seed", type=int, default=0, help="of the searches")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    fits = draw(arguments.output / PICTURE_NAME, arguments.seed)
    write_result(arguments.output / "pictures", {"rows": [label for label, *_ in ROWS], "fit": fits})


if __name__ == "__main__":
    main()
