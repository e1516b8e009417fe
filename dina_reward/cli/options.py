"""Options that several commands take, as annotated types; those of one command stand in its file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class DtypeChoice(StrEnum):
    """A dtype of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
DeviceOption = Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")]
DtypeOption = Annotated[DtypeChoice, typer.Option(help="Dtype of the pipeline and backbone.")]
PipelineOption = Annotated[
    str | None,
    typer.Option(help="Path or hub id of the diffusers pipeline. Default: the backbone that the checkpoint names."),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images, latents or prompts per pass.")]
SchemaOption = Annotated[str | None, typer.Option(help="Schema of the dataset. Default: found from its columns.")]
SplitOption = Annotated[str, typer.Option(help="Split of the dataset.")]
ImageRootOption = Annotated[Path | None, typer.Option(help="Folder that relative image paths start from.")]
MinConfidenceOption = Annotated[float | None, typer.Option(help="Leave out pairs whose label is less sure than this.")]

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command that hands its arguments to a `ConfigParser`."""
