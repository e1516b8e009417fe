"""`dina-reward sample`: the best samples of a pipeline that a budget of denoiser calls buys."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dina_reward.cli.console import print_table
from dina_reward.cli.options import BatchSizeOption, DeviceOption, DtypeChoice, DtypeOption, JsonOption


class MethodChoice(StrEnum):
    """A method of search; see `dina_reward.search`."""

    best_of_n = "best_of_n"
    halving = "halving"
    fk = "fk"
    stepwise = "stepwise"
    zero_order = "zero_order"
    paths = "paths"
    guidance = "guidance"
    noise_optimization = "noise_optimization"


PipelineArgument = Annotated[
    str,
    typer.Argument(help="Path or hub id of a diffusers pipeline; 'shapes' and 'shapes-ddpm' ship with the package."),
]
PromptsArgument = Annotated[list[str], typer.Argument(help="One or several prompts.")]
RewardOption = Annotated[
    str | None, typer.Option(help="Directory or hub id of a reward on this pipeline. Default: of 'shapes', its own.")
]
MethodOption = Annotated[MethodChoice, typer.Option(help="How to spend the budget.")]
BudgetOption = Annotated[float, typer.Option(help="Denoiser calls per prompt, in whole samples.")]
KeepOption = Annotated[int, typer.Option(min=1, help="Samples to return per prompt.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Setting of the method, such as checks=0.4,0.6 or strength=5.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Denoising steps. Default: the pipeline's own.")]
GuidanceOption = Annotated[float, typer.Option("--guidance-scale", help="Classifier-free guidance above 1.")]
HeightOption = Annotated[int | None, typer.Option(help="In pixels. Default: the pipeline's own.")]
WidthOption = Annotated[int | None, typer.Option(help="In pixels. Default: the pipeline's own.")]
LengthOption = Annotated[
    int | None,
    typer.Option("--max-sequence-length", help="Tokens of a prompt. Default: the pipeline's own."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of all draws.")]
OutputOption = Annotated[Path, typer.Option(help="Picture of what was found, as PNG.")]
ReportOption = Annotated[
    bool, typer.Option("--report", help="Write a page beside it: pictures, scores by step, lineage, calls.")
]


def sample(
    pipeline: PipelineArgument,
    prompts: PromptsArgument,
    reward: RewardOption = None,
    method: MethodOption = MethodChoice.stepwise,
    budget: BudgetOption = 8.0,
    keep: KeepOption = 1,
    settings: SetOption = None,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = 1.0,
    height: HeightOption = None,
    width: WidthOption = None,
    max_sequence_length: LengthOption = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 8,
    output: OutputOption = Path("samples.png"),
    report: ReportOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = DtypeChoice.float32,
    as_json: JsonOption = False,
) -> None:
    """Samples prompts and returns what the reward likes best, at a budget of denoiser calls."""
    from dina_reward.cli.sample_run import parsed_settings, sample_prompts, write_files

    result = sample_prompts(
        pipeline,
        prompts,
        reward,
        device=device,
        dtype=dtype.value,
        method=method.value,
        budget=budget,
        keep=keep,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        height=height,
        width=width,
        max_sequence_length=max_sequence_length,
        seed=seed,
        batch_size=batch_size,
        **parsed_settings(settings or []),
    )
    written = write_files(result, output, report)
    calls = {name: getattr(result, name) for name in ("denoiser_calls", "reward_calls", "decoder_calls")}
    if as_json:
        rows = [
            {"prompt": prompt, "score": score}
            for prompt, score in zip(result.prompts, result.scores.tolist(), strict=True)
        ]
        typer.echo(json.dumps({"samples": rows, "seconds": result.seconds, **calls, "files": list(map(str, written))}))
        return
    table = result.check_table()
    names = ("step", "noise level", "scored", "kept", "mean score", "best score")
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in line.values()] for line in table]
    print_table("scores along the way", names, cells)
    print_table("", ("", ""), [(name.replace("_", " "), f"{count:,}") for name, count in calls.items()])
    for path in written:
        typer.echo(f"wrote {path}")
