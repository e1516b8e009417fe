"""Runs several commands one after another in one process, whose imports cost more than the commands.

python run_commands.py OUTPUT_DIR COMMANDS.json

The file maps names to arguments of ``dina-reward``. What a command prints goes to ``NAME.out`` and ``NAME.err``, also what
libraries print past Python's own streams; ``codes.json`` has the exit codes, and ``loaded.json`` which of `HEAVY` have been
imported when a command ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path


HEAVY = ("diffusers", "dina_reward.reward", "dina_reward.alignment.policy")


@contextlib.contextmanager
def streams_into(out: Path, err: Path) -> Iterator[None]:
    """Sends the process's own standard output and error to files."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    with out.open("wb") as first, err.open("wb") as second:
        os.dup2(first.fileno(), 1)
        os.dup2(second.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, place in zip(before, (1, 2), strict=True):
                os.dup2(descriptor, place)
                os.close(descriptor)


def run(arguments: list[str]) -> int:
    """A command as `python -m dina_reward.cli` runs it; its exit code."""
    from dina_reward.cli.app import main

    sys.argv = ["dina-reward", *arguments]
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def make_the_world_small() -> None:
    """A quarter of the demo's held-out prompts and of the pool of pairs: what is printed beside results is the same."""
    import dina_reward.shapes.alignment as alignment
    import dina_reward.shapes.preferences as preferences

    build_pool = preferences.build_pool

    alignment.EVALUATION_PROMPTS = alignment.EVALUATION_IMAGES
    preferences.build_pool = lambda pipeline, split, count, seed: build_pool(pipeline, split, 16, seed)


if __name__ == "__main__":
    directory, commands = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    codes, loaded = {}, {}
    for name, arguments in commands.items():
        with streams_into(directory / f"{name}.out", directory / f"{name}.err"):
            if name in ("eval", "demo"):
                make_the_world_small()
            codes[name] = run(arguments)
        loaded[name] = [module for module in HEAVY if module in sys.modules]
    (directory / "codes.json").write_text(json.dumps(codes))
    (directory / "loaded.json").write_text(json.dumps(loaded))
