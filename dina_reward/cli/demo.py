"""`dina-reward demo`: score, align and judge in the embedded world, ending with one picture and one table."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dina_reward.alignment.evaluation import EvaluationRecord
from dina_reward.alignment.pictures import grid_tiles
from dina_reward.cli.console import print_table
from dina_reward.shapes.alignment import (
    EVALUATION_IMAGES,
    EVALUATION_PROMPTS,
    AlignmentResult,
    align,
    held_out_prompts,
)
from dina_reward.shapes.autoencoder import decode_latents
from dina_reward.shapes.generator import sample_latents
from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.prompts import sample_prompts
from dina_reward.shapes.shipped import load_pipeline, load_reward


PICTURE_NAME = "demo.png"
_ROWS, _COLUMNS = 2, 8


def run_demo(output: Path, *, iterations: int, seed: int) -> None:
    """Runs the demo.

    Args:
        output: directory for pictures, history and the aligned LoRA.
        iterations: alignment iterations.
        seed: of every random draw.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    print("1. Scoring latents of held-out prompts; the oracle sees the decoded images only to check the reward.")
    show_scores(seed)
    print(
        f"\n2. Aligning the generator with the latent reward ({iterations} iterations); nothing is decoded in training."
    )
    result = align(output, iterations=iterations, seed=seed, logging_strategy="no")
    picture = draw(result, output / PICTURE_NAME)
    show_result(result)
    print(f"\nPicture: {picture}\nLoRA for load_lora_weights, history and all evaluation pictures: {output}")


def show_scores(seed: int, count: int = 8) -> None:
    """Prints the reward of a few samples beside the oracle's fit."""
    pipeline = load_pipeline()
    reward = load_reward(pipeline=pipeline, share_backbone=True)
    prompts = sample_prompts(count, "held_out", seed=seed)
    latents = sample_latents(pipeline, prompts, torch.Generator().manual_seed(seed))
    scores = reward(latents, prompts, seed=seed)
    fit = Oracle()(decode_latents(pipeline.vae, latents), prompts).fit
    order = scores.argsort(descending=True).tolist()
    print_table(
        "Samples of the unaligned generator",
        ("prompt", "latent reward", "oracle fit"),
        [(prompts[i], f"{scores[i]:.2f}", f"{fit[i]:.2f}") for i in order],
    )


def show_result(result: AlignmentResult) -> None:
    """Prints held-out means before and after."""
    first, last = result.history[0].metrics, result.history[-1].metrics
    names = {"reward": "latent reward (trained on)", "fit": "oracle: prompt fit", "cleanness": "oracle: cleanness"}
    print_table(
        f"Held-out prompts, {result.seconds:.0f} s of training",
        ("", "before", "after", "change"),
        [(text, f"{first[k]:.3f}", f"{last[k]:.3f}", f"{last[k] - first[k]:+.3f}") for k, text in names.items()],
    )


def draw(result: AlignmentResult, path: Path) -> Path:
    """Draws the same held-out prompts and noise before and after, and the curves of reward and oracle."""
    from matplotlib.figure import Figure

    first, last = result.history[0], result.history[-1]
    figure = Figure(figsize=(15, 6.2), layout="constrained")
    samples, curves = figure.subfigures(1, 2, width_ratios=(2.1, 1))  # type: ignore[misc]
    figure.suptitle("Flow-GRPO on a latent reward: held-out prompts, the same noise, no pixel decoded in training")
    axes = samples.subplots(2 * _ROWS, _COLUMNS)
    prompts = held_out_prompts()[: _ROWS * _COLUMNS]
    for offset, record in enumerate((first, last)):
        assert record.picture is not None
        grid = Image.open(result.output_dir / record.picture)
        for number, tile in enumerate(grid_tiles(grid, EVALUATION_IMAGES, len(prompts))):
            row, column = divmod(number, _COLUMNS)
            _draw_tile(axes[2 * row + offset, column], tile, ("before", "after")[offset] if column == 0 else "")
            if offset == 0:
                axes[2 * row, column].set_title(_wrapped(prompts[number]), fontsize=8)
    samples.suptitle(f"oracle fit {first.metrics['fit']:.2f} before, {last.metrics['fit']:.2f} after", fontsize=10)
    _draw_curves(curves.subplots(), result.history)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def _wrapped(prompt: str) -> str:
    """ "a large red circle on a white background" -> two short lines."""
    thing, background = prompt.removeprefix("a ").split(" on a ")
    return f"{thing}\non {background.removesuffix(' background')}"


def _draw_tile(axes, tile: Image.Image, label: str) -> None:  # type: ignore[no-untyped-def]
    axes.imshow(tile)
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(label)


def _draw_curves(axes, history: list[EvaluationRecord]) -> None:  # type: ignore[no-untyped-def]
    steps = [record.step for record in history]
    for metric, style in (("fit", "o-"), ("cleanness", "s--")):
        axes.plot(steps, [record.metrics[metric] for record in history], style, label=f"oracle {metric}")
    axes.set(xlabel="optimizer step", ylabel=f"oracle, {EVALUATION_PROMPTS} held-out prompts", ylim=(0, 1))
    rewards = axes.twinx()
    rewards.plot(steps, [record.metrics["reward"] for record in history], "^:", color="tab:red", label="latent reward")
    rewards.set_ylabel("latent reward (raw)", color="tab:red")
    lines = [*axes.get_lines(), *rewards.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
