"""`dina-reward bench`: what scoring, training and sampling cost on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dina_reward.cli.console import in_terminal
from dina_reward.cli.options import DeviceOption, DtypeChoice, DtypeOption, JsonOption
from dina_reward.shipped import WORLDS


if TYPE_CHECKING:
    from dina_reward.bench import BenchReport, Subject


def bench(
    target: Annotated[
        str,
        typer.Argument(
            help="'shapes', a diffusers pipeline (directory or hub id), or a published model such as SD3.5-Medium."
        ),
    ] = "shapes",
    size: Annotated[
        int | None, typer.Option(min=8, help="Side of the images in pixels. Default: the model's.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="random: at the model's size, nothing is downloaded; loaded. Default: random for published models."
        ),
    ] = None,
    dtype: DtypeOption = DtypeChoice.float32,
    device: DeviceOption = None,
    quick: Annotated[
        bool, typer.Option(help="Small batches, nothing compiled, half a second or one call for each row.")
    ] = False,
    parts: Annotated[
        str, typer.Option(help="Comma-separated: score, pixels, training, denoiser.")
    ] = "score,pixels,training,denoiser",
    batch_sizes: Annotated[
        str | None, typer.Option(help="Comma-separated. Default: 1,4,8,32, with --quick 1,4.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="For each row. Default: 2, with --quick 0.5.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the JSON and the picture.")] = Path(
        "outputs/bench"
    ),
    as_json: JsonOption = False,
) -> None:
    """Measures scores, decoding, training steps and denoiser calls against what this machine can do."""
    import json

    from dina_reward.bench.run import BATCH_SIZES, QUICK_BATCH_SIZES, BenchSettings, run_bench

    sizes = QUICK_BATCH_SIZES if quick else BATCH_SIZES
    settings = BenchSettings(
        parts=tuple(part.strip() for part in parts.split(",")),
        batch_sizes=sizes if batch_sizes is None else _numbers(batch_sizes),
        compile=not quick,
        seconds=(0.5 if quick else 2.0) if seconds is None else seconds,
        quick=quick,
    )
    report = run_bench(_subject(target, size, weights, dtype.value, device), settings, progress=in_terminal())
    written = report.save(output)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    _show(report)
    print(f"Written: {', '.join(map(str, written))}")


def _show(report: BenchReport) -> None:
    machine = report.machine
    size = f"{report.width} x {report.height}"
    print(
        f"{report.model} ({report.weights} weights), {size}, {machine.dtype}, {machine.device}\n\n{report.table()}\n"
    )
    print(f"Matrix products: {machine.matrix_rate / 1e9:,.0f} GFLOP/s; memory: {machine.memory_rate / 1e9:,.1f} GB/s")
    for name, ratio in report.ratios.items():
        print(f"{name}: {ratio:.2f}")
    if report.iteration is not None:
        part = report.iteration
        print(
            f"Flow-GRPO, {part.steps} steps and {part.train_steps} losses per sample: rollout {part.rollout:.3g} s, reward "
            f"{part.reward:.3g} s ({100 * part.reward_share:.1f} %), update {part.update:.3g} s"
        )
    for name, reason in report.failed.items():
        print(f"Left out: {name}: {reason}")


def _subject(target: str, size: int | None, weights: str | None, dtype: str, device: str | None) -> Subject:
    import torch

    from dina_reward.backbones.structures import published_as, published_models
    from dina_reward.bench.subject import loaded_subject, random_subject

    if weights not in (None, "random", "loaded"):
        raise ValueError(f"--weights is {weights!r}; expected random or loaded")
    published = published_as(target)
    if weights == "random" and not published:
        names = ", ".join(model.name for model in published_models())
        raise ValueError(f"random weights are made for published models alone: {names}; got {target!r}")
    if published and weights != "loaded":
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return random_subject(published[0], device=chosen, dtype=getattr(torch, dtype), height=size, width=size)
    from dina_reward.cli.score_run import load_pipeline
    from dina_reward.shapes.text import MAX_PROMPT_TOKENS

    source = published[0].model_id if published else target
    pipeline = load_pipeline(str(source), device=device, dtype=dtype)
    return loaded_subject(
        pipeline, target, height=size, width=size, max_sequence_length=MAX_PROMPT_TOKENS if target in WORLDS else None
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--batch-sizes is {text!r}; expected whole numbers with commas, such as 1,4,8") from None
