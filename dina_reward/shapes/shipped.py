"""The weights that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

    from dina_reward import LatentReward


def weights_dir(name: str) -> Path:
    """The directory of shipped weights called "sd3" (the pipeline) or "sd3-reward" (its reward)."""
    root = Path(__file__).parent / "weights"
    directory = root / name
    if not directory.is_dir():
        shipped = sorted(path.name for path in root.glob("*") if path.is_dir())
        raise ValueError(f"No weights called {name!r} in {root}; shipped: {', '.join(shipped) or 'none'}.")
    return directory


def load_pipeline(**kwargs: Any) -> StableDiffusion3Pipeline:
    """The shipped generator; `kwargs` go to `StableDiffusion3Pipeline.from_pretrained`."""
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(weights_dir("sd3"), **kwargs)


def load_reward(**kwargs: Any) -> LatentReward:
    """The shipped reward; `kwargs`, for example `pipeline=`, go to `LatentReward.from_pretrained`."""
    from dina_reward import LatentReward

    return LatentReward.from_pretrained(weights_dir("sd3-reward"), **kwargs)
