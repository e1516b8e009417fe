"""What `dina-reward demo` does: score, align and judge in the embedded world, ending with one picture and one table."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dina_reward.alignment.monitoring.evaluation import EvaluationRecord
from dina_reward.alignment.monitoring.pictures import grid_tiles
from dina_reward.cli.console import print_table
from dina_reward.shapes.alignment import (
    EVALUATION_IMAGES,
    EVALUATION_PROMPTS,
    OPTIMIZER_STEPS_PER_ITERATION,
    AlignmentResult,
    align,
    held_out_prompts,
)
from dina_reward.shapes.autoencoder import decode_latents
from dina_reward.shapes.generator import sample_latents
from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.prompts import sample_prompts
from dina_reward.shapes.shipped import load_pipeline, load_reward
from dina_reward.shapes.tiles import draw_tile, shown_prompts, two_lines


PICTURE_NAME = "demo.png"


def run_demo(output: Path, *, iterations: int, seed: int) -> None:
    """Runs the demo.

    Args:
        output: directory for pictures, history and the aligned LoRA.
        iterations: alignment iterations.
        seed: of every random draw.
    """
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
    """Draws held-out prompts before and after, from the same noise, with the oracle's reading, and the curves.

    Shown are the first prompts of the evaluation that ask for each shape, so many for each: no picture is chosen.
    """
    from matplotlib.figure import Figure

    first, last = result.history[0], result.history[-1]
    prompts = held_out_prompts()[:EVALUATION_IMAGES]
    shown = shown_prompts(prompts)
    figure = Figure(figsize=(17, 4.8), layout="constrained")
    samples, curves = figure.subfigures(1, 2, width_ratios=(3.1, 1))  # type: ignore[misc]
    axes = samples.subplots(2, len(shown))
    for row, (name, record) in enumerate((("before", first), ("after", last))):
        assert record.picture is not None
        tiles = grid_tiles(Image.open(result.output_dir / record.picture), EVALUATION_IMAGES)
        for column, number in enumerate(shown):
            draw_tile(axes[row, column], tiles[number], prompts[number])
        axes[row, 0].set_ylabel(f"{name}\nfit {record.metrics['fit']:.2f}", fontsize=13)
    for column, number in enumerate(shown):
        axes[0, column].set_title(two_lines(prompts[number]), fontsize=9, fontweight="bold")
    samples.suptitle(
        "Told what to draw: a generator before and after DiffusionNFT on a latent reward (held-out prompts, same noise)"
    )
    _draw_curves(curves.subplots(), result.history)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def _draw_curves(axes, history: list[EvaluationRecord]) -> None:  # type: ignore[no-untyped-def]
    iterations = [record.step / OPTIMIZER_STEPS_PER_ITERATION for record in history]
    for metric, style, label in (
        ("fit", "o-", "oracle: share of what was asked for"),
        ("cleanness", "s--", "oracle: cleanness"),
    ):
        axes.plot(iterations, [record.metrics[metric] for record in history], style, label=label)
    axes.set(xlabel="iterations", ylabel=f"oracle, {EVALUATION_PROMPTS} held-out prompts", ylim=(0, 1))
    rewards = axes.twinx()
    values = [record.metrics["reward"] for record in history]
    rewards.plot(iterations, values, "^:", color="tab:red", label="latent reward (trained on)")
    rewards.set_ylabel("latent reward (raw score)", color="tab:red")
    lines = [*axes.get_lines(), *rewards.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right", fontsize=8)
