"""The names under which the package's own generators and rewards are known everywhere: ``shapes`` and ``shapes-ddpm``."""

from __future__ import annotations

import os
from pathlib import Path


WORLDS = {"shapes": "flow", "shapes-ddpm": "ddpm"}
"""The embedded generators, flow-matching and DDPM, by name; each has a reward of the same name."""

WEIGHTS = Path(__file__).parent / "shapes" / "weights"


def reward_path(name: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Directory of a reward that ships with the package; any other path or id as it is (``./shapes`` is a directory)."""
    return WEIGHTS / f"{WORLDS[name]}-reward" if isinstance(name, str) and name in WORLDS else name


def pipeline_path(name: str) -> str:
    """Directory of a pipeline that ships with the package; any other path or id as it is."""
    return str(WEIGHTS / WORLDS[name]) if name in WORLDS else name
