"""`dina-reward`: score, eval, cache, train, convert, demo, info, recipes."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dina_reward.cli.cache import cache
from dina_reward.cli.console import print_table
from dina_reward.cli.eval import evaluate
from dina_reward.cli.recipes import app as recipes_app
from dina_reward.recipes.quiet import hide_notes_of_optional_kernels


app = typer.Typer(
    name="dina-reward",
    help="Latent rewards for diffusion and flow-matching models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(recipes_app, name="recipes")
app.command("eval")(evaluate)
app.command("cache")(cache)

_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

RewardArgument = Annotated[
    str, typer.Argument(help="Directory or hub id of a reward; 'shapes' is the one that ships with the package.")
]
PipelineOption = Annotated[
    str | None,
    typer.Option(help="Path or hub id of the diffusers pipeline. Default: the backbone that the checkpoint names."),
]


class EnsembleChoice(StrEnum):
    """How several noise levels are combined."""

    tokens = "tokens"
    mean = "mean"


class DtypeChoice(StrEnum):
    """Dtype of the backbone."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def score(
    reward: RewardArgument,
    inputs: Annotated[
        list[Path], typer.Argument(help="Images, or .safetensors files with a 'latents' tensor.", exists=True)
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="One prompt for all inputs, or one per input.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line, instead of --prompt.", exists=True)
    ] = None,
    pipeline: PipelineOption = None,
    noise_level: Annotated[
        list[float] | None,
        typer.Option(
            help="Noise level in [0, 1]; repeat it for an ensemble. Default: 0.1 for images, else the checkpoint's."
        ),
    ] = None,
    ensemble: Annotated[EnsembleChoice, typer.Option(help="How several levels are combined.")] = EnsembleChoice.tokens,
    num_noise_samples: Annotated[int, typer.Option(help="Noise draws per latent.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    normalize: Annotated[bool, typer.Option(help="Apply the checkpoint's affine map to the scores.")] = False,
    batch_size: Annotated[int, typer.Option(help="Latents per backbone pass.")] = 8,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    dtype: Annotated[DtypeChoice, typer.Option(help="Dtype of the pipeline and backbone.")] = DtypeChoice.float32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Scores images or saved latents against prompts, as a table or JSON."""
    from dina_reward.cli.score import ScoreRequest, score_files
    from dina_reward.data.files import read_lines

    if prompt and prompts_file is not None:
        raise ValueError("--prompt and --prompts-file exclude each other; give the prompts in one way")
    prompts = read_lines(prompts_file) if prompts_file is not None else (prompt or [])
    request = ScoreRequest(
        reward=reward,
        inputs=inputs,
        prompts=[line for line in prompts if line.strip()],
        pipeline=pipeline,
        noise_level=noise_level or None,
        ensemble=ensemble.value,
        num_noise_samples=num_noise_samples,
        seed=seed,
        normalize=normalize,
        batch_size=batch_size,
        device=device,
        dtype=dtype.value,
    )
    rows = score_files(request)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    print_table(
        "scores",
        ("input", "prompt", "score", "noise std"),
        [
            (
                row["input"],
                row["prompt"],
                f"{row['score']:.4f}",
                "" if row["noise_std"] is None else f"{row['noise_std']:.4f}",
            )
            for row in rows
        ],
    )


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Directory or hub id of a checkpoint in any readable layout.")],
    target: Annotated[Path, typer.Argument(help="Directory to write in native form.")],
) -> None:
    """Writes a published reference checkpoint in native form."""
    from dina_reward.checkpoints import convert_checkpoint

    config = convert_checkpoint(source, target)
    typer.echo(f"wrote {target} ({config.family}, {config.num_layers} blocks, image taps {config.visual_taps})")


@app.command()
def info(
    target: Annotated[
        str,
        typer.Argument(
            help="A reward (directory, hub id or 'shapes'); a diffusers pipeline (directory or hub id); a diffusers class "
            "such as FluxPipeline; or a published model such as SD3.5-Medium."
        ),
    ],
    height: Annotated[int | None, typer.Option(min=1, help="Image height in pixels. Default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Image width in pixels. Default: the model's.")] = None,
    num_frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video. Default: the model's.")] = None,
    flops: Annotated[bool, typer.Option(help="Count FLOPs, which takes seconds per model.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects instead of tables.")] = False,
) -> None:
    """Shows what a reward is, or what a reward on a generator would be and cost, without loading weights."""
    from dina_reward.cli.info import show_info

    show_info(target, height=height, width=width, num_frames=num_frames, flops=flops, as_json=as_json)


@app.command(context_settings=_PASS_THROUGH)
def train(context: typer.Context) -> None:
    """Trains a reward from preferences: `dina-reward train --config recipe.yaml`; `--help` lists every option."""
    from dina_reward.recipes.reward_training import main as run

    run(context.args)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the picture and the table.")] = Path(
        "outputs/demo"
    ),
    iterations: Annotated[int, typer.Option(min=1, help="Alignment iterations.")] = 45,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
) -> None:
    """Aligns the embedded generator with the embedded reward on the CPU, in minutes, and shows what happened."""
    from dina_reward.cli.demo import run_demo

    run_demo(output, iterations=iterations, seed=seed)


def main() -> None:
    """Entry point: errors in the input end in one line, not in a traceback."""
    import sys

    hide_notes_of_optional_kernels()
    try:
        app()
    except ValueError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)
