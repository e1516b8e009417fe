"""`dina-reward convert`: a published checkpoint becomes a native one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[str, typer.Argument(help="Directory or hub id of a checkpoint in any readable layout.")],
    target: Annotated[Path, typer.Argument(help="Directory to write in native form.")],
) -> None:
    """Writes a published reference checkpoint in native form."""
    from dina_reward.checkpoints import convert_checkpoint

    config = convert_checkpoint(source, target)
    typer.echo(f"wrote {target} ({config.family}, {config.num_layers} blocks, image taps {config.visual_taps})")
