"""`dina-reward score`: images or saved latents against prompts."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dina_reward.cli.console import print_table
from dina_reward.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeChoice,
    DtypeOption,
    JsonOption,
    PipelineOption,
)


class EnsembleChoice(StrEnum):
    """How several noise levels are combined."""

    tokens = "tokens"
    mean = "mean"


RewardArgument = Annotated[
    str, typer.Argument(help="Directory or hub id of a reward; 'shapes' is the one that ships with the package.")
]
InputsArgument = Annotated[
    list[Path], typer.Argument(help="Images, or .safetensors files with a 'latents' tensor.", exists=True)
]
PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="One prompt for all inputs, or one per input.")
]
PromptsFileOption = Annotated[
    Path | None, typer.Option(help="Text file with one prompt per line, instead of --prompt.", exists=True)
]
NoiseLevelOption = Annotated[
    list[float] | None,
    typer.Option(
        help="Noise level in [0, 1]; repeat it for an ensemble. Default: 0.1 for images, else the checkpoint's."
    ),
]
EnsembleOption = Annotated[EnsembleChoice, typer.Option(help="How several levels are combined.")]
NoiseSamplesOption = Annotated[int, typer.Option(help="Noise draws per latent.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the noise.")]
NormalizeOption = Annotated[bool, typer.Option(help="Apply the checkpoint's affine map to the scores.")]


def score(
    reward: RewardArgument,
    inputs: InputsArgument,
    prompt: PromptOption = None,
    prompts_file: PromptsFileOption = None,
    pipeline: PipelineOption = None,
    noise_level: NoiseLevelOption = None,
    ensemble: EnsembleOption = EnsembleChoice.tokens,
    num_noise_samples: NoiseSamplesOption = 1,
    seed: SeedOption = 0,
    normalize: NormalizeOption = False,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = None,
    dtype: DtypeOption = DtypeChoice.float32,
    as_json: JsonOption = False,
) -> None:
    """Scores images or saved latents against prompts, as a table or JSON."""
    from dina_reward.cli.score_run import score_files
    from dina_reward.data.files import read_lines

    if prompt and prompts_file is not None:
        raise ValueError("--prompt and --prompts-file exclude each other; give the prompts in one way")
    prompts = read_lines(prompts_file) if prompts_file is not None else (prompt or [])
    rows = score_files(
        inputs,
        [line for line in prompts if line.strip()],
        reward,
        pipeline,
        device=device,
        dtype=dtype.value,
        seed=seed,
        noise_level=noise_level,
        ensemble=ensemble.value,
        num_noise_samples=num_noise_samples,
        normalize=normalize,
        batch_size=batch_size,
    )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    cells = [(row["input"], row["prompt"], _number(row["score"]), _number(row["noise_std"])) for row in rows]
    print_table("scores", ("input", "prompt", "score", "noise std"), cells)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
