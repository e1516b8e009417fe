"""`dina-reward`: which commands there are."""

from __future__ import annotations

import typer

from dina_reward.checks.disk import disk_fault
from dina_reward.cli.align import align
from dina_reward.cli.bench import bench
from dina_reward.cli.cache import cache
from dina_reward.cli.convert import convert
from dina_reward.cli.demo import demo
from dina_reward.cli.distill import distill
from dina_reward.cli.eval import evaluate
from dina_reward.cli.info import info
from dina_reward.cli.options import PASS_THROUGH
from dina_reward.cli.plan import plan
from dina_reward.cli.recipes import app as recipes
from dina_reward.cli.sample import sample
from dina_reward.cli.score import score
from dina_reward.cli.serve import serve
from dina_reward.cli.train import train
from dina_reward.lazy import MissingExtraError
from dina_reward.quiet import hide_library_notes


app = typer.Typer(
    name="dina-reward",
    help="Latent rewards for diffusion and flow-matching models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(score)
app.command()(sample)
app.command()(info)
app.command("eval")(evaluate)
app.command()(cache)
app.command(context_settings=PASS_THROUGH)(train)
app.command(context_settings=PASS_THROUGH)(align)
app.command()(bench)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(plan)
app.command()(serve)
app.command(context_settings=PASS_THROUGH)(distill)
app.command()(convert)
app.add_typer(recipes, name="recipes")
app.command()(demo)


def main() -> None:
    """Entry point: errors in the input end in one line, not in a traceback."""
    import sys

    hide_library_notes()
    try:
        app()
    except (ValueError, MissingExtraError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(2)
    except Exception as error:
        fault = disk_fault(error)
        if fault is None:
            raise
        typer.secho(f"error: {fault}", err=True, fg=typer.colors.RED)
        sys.exit(1)
