"""`dina-reward eval`: rewards side by side on a preference dataset."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dina_reward.checkpoints.locking import sole_owner
from dina_reward.cli.options import (
    BatchSizeOption,
    DeviceOption,
    DtypeChoice,
    DtypeOption,
    ImageRootOption,
    JsonOption,
    MinConfidenceOption,
    PipelineOption,
    SchemaOption,
    SplitOption,
)


if TYPE_CHECKING:
    from dina_reward.evaluation import Comparison

RewardsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="CHECKPOINT",
        help="Directories or hub ids of latent rewards; 'shapes' is the one that ships with the package.",
        show_default=False,
    ),
]
DatasetArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATASET",
        help="Preferences: a file, directory, latent cache or hub id; 'shapes' makes them on the spot.",
    ),
]
ClipOption = Annotated[
    list[str] | None, typer.Option(help="CLIP-type pixel reward to compare, e.g. yuvalkirstain/PickScore_v1.")
]
ClipProcessorOption = Annotated[str | None, typer.Option(help="Processor of the CLIP models. Default: their own.")]
FunctionOption = Annotated[
    list[str] | None,
    typer.Option(help="Dotted name of any function of latents or images and prompts to compare."),
]
MaxPairsOption = Annotated[
    int | None, typer.Option(min=1, help="Use the first so many pairs. Default: all; 2,000 of 'shapes'.")
]
LevelsOption = Annotated[
    str, typer.Option(help="Noise levels, each on its own, separated by commas; 'none' for none.")
]
EnsemblesOption = Annotated[
    list[str] | None,
    typer.Option(help="Levels of an ensemble, separated by commas; repeat it; 'none' for none.", show_default=False),
]
EnsembleKindOption = Annotated[
    str, typer.Option(help="How levels are combined: tokens, mean, or both, separated by a comma.")
]
DrawsOption = Annotated[str, typer.Option(help="Numbers of noise draws, separated by commas.")]
ByOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Report accuracy, margin and calibration by the values of this column, too; repeat it. "
        "Default: source and resolution.",
        show_default=False,
    ),
]
EnsembleAdviceOption = Annotated[
    bool,
    typer.Option(
        "--ensemble-advice",
        help="Say which ensemble pays for each latent reward: score every level under four noise draws (or --draws), "
        "and levels with shared noise and noise of their own.",
    ),
]
TiesOption = Annotated[
    str | None,
    typer.Option(help="Tie convention: half, imagereward, hpdv2, pickscore, dina_lrm. Default: the benchmark's."),
]
TieThresholdOption = Annotated[
    float | None,
    typer.Option(help="Score difference up to which the prediction is a tie. Default: 0; pickscore tunes it."),
]
ResamplesOption = Annotated[int, typer.Option(min=1, help="Resamples of the bootstrap.")]
SeedOption = Annotated[int, typer.Option(help="Seed of noise, sides, resampling and tuning.")]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Directory for evaluation.json, evaluation.md, evaluation.png."),
]


def evaluate(
    rewards: RewardsArgument = None,
    *,
    dataset: DatasetArgument,
    clip: ClipOption = None,
    clip_processor: ClipProcessorOption = None,
    function: FunctionOption = None,
    pipeline: PipelineOption = None,
    split: SplitOption = "test",
    schema: SchemaOption = None,
    image_root: ImageRootOption = None,
    min_confidence: MinConfidenceOption = None,
    max_pairs: MaxPairsOption = None,
    levels: LevelsOption = "0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    ensembles: EnsemblesOption = None,
    ensemble_kind: EnsembleKindOption = "tokens",
    draws: DrawsOption = "1",
    by: ByOption = None,
    ensemble_advice: EnsembleAdviceOption = False,
    ties: TiesOption = None,
    tie_threshold: TieThresholdOption = None,
    resamples: ResamplesOption = 1000,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = None,
    dtype: DtypeOption = DtypeChoice.float32,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy with confidence intervals, calibration, slices and cost of rewards, side by side on one dataset.

    Pairwise accuracy at each noise level and for ensembles, under the benchmark's own tie convention.
    """
    from dina_reward.cli.eval_run import DEFAULT_COLUMNS, EvalRequest, run_evaluation

    _check_options(tie_threshold, output)
    request = EvalRequest(
        rewards=list(rewards or ()),
        dataset=dataset,
        clip=list(clip or ()),
        clip_processor=clip_processor,
        functions=list(function or ()),
        pipeline=pipeline,
        split=split,
        schema=schema,
        image_root=image_root,
        min_confidence=min_confidence,
        max_pairs=max_pairs,
        levels=_numbers(levels, "--levels"),
        ensembles=_ensembles(ensembles),
        kinds=_kinds(ensemble_kind),
        draws=[_whole(count) for count in _numbers(draws, "--draws")],
        by=by or DEFAULT_COLUMNS,
        advice=ensemble_advice,
        ties=ties,
        tie_threshold=tie_threshold,
        resamples=resamples,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype.value,
    )
    with contextlib.nullcontext() if output is None else sole_owner(output):
        _report(run_evaluation(request), output, as_json)


def _check_options(tie_threshold: float | None, output: Path | None) -> None:
    if tie_threshold is not None and not (math.isfinite(tie_threshold) and tie_threshold >= 0):
        raise ValueError(f"--tie-threshold must be a number of at least 0, got {tie_threshold}")
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a directory, but {output} is a file")
    if output is not None:
        above = next(folder for folder in output.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ValueError(f"--output {output} cannot be made: {above} is no directory that can be written to")


def _report(comparison: Comparison, output: Path | None, as_json: bool) -> None:
    from dina_reward.cli.eval_run import write_evaluation
    from dina_reward.evaluation import comparison_table

    if output is not None:
        write_evaluation(comparison, output)
        typer.echo(f"wrote {output}/evaluation.json, .md and .png", err=True)
    typer.echo(json.dumps(comparison.to_dict(), indent=2) if as_json else comparison_table(comparison))


def _numbers(text: str, option: str) -> list[float]:
    """Numbers separated by commas; ``none`` stands for none."""
    if text.strip().lower() == "none":
        return []
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes numbers separated by commas, or 'none'; got {text!r}") from None


def _ensembles(values: list[str] | None) -> list[list[float]]:
    if values is None:
        return [[0.2, 0.5, 0.7]]
    return [numbers for value in values if (numbers := _numbers(value, "--ensembles"))]


def _kinds(text: str) -> list[Literal["tokens", "mean"]]:
    kinds = [part.strip() for part in text.split(",")]
    if not set(kinds) <= {"tokens", "mean"}:
        raise ValueError(f"--ensemble-kind takes 'tokens', 'mean' or 'tokens,mean'; got {text!r}")
    return ["tokens" if kind == "tokens" else "mean" for kind in kinds]


def _whole(number: float) -> int:
    if not math.isfinite(number) or number != int(number) or number < 1:
        raise ValueError(f"--draws takes whole numbers of at least 1, got {number:g}")
    return int(number)
