"""The weights that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dina_reward.quiet import no_loading_bars


if TYPE_CHECKING:
    from torch import Tensor

    from dina_reward import LatentReward


SHIPPED = ("flow", "ddpm")
"""The worlds, each with a directory of its name, the pipeline, and with "-reward" and "-aligned" added."""


def weights_dir(name: str) -> Path:
    """The directory of shipped weights: "flow" or "ddpm" (the pipelines), with "-reward" or "-aligned" added."""
    root = Path(__file__).parent / "weights"
    directory = root / name
    if not directory.is_dir():
        shipped = sorted(path.name for path in root.glob("*") if path.is_dir())
        raise ValueError(f"No weights called {name!r} in {root}; shipped: {', '.join(shipped) or 'none'}.")
    return directory


def load_pipeline(world: str = "flow", **kwargs: Any) -> Any:
    """A shipped generator; it is loaded in a blink, so without loading bars.

    Args:
        world (str): "flow" for the `StableDiffusion3Pipeline`, "ddpm" for the `StableDiffusionPipeline`.
        kwargs: for `from_pretrained`, such as ``torch_dtype=``.
    """
    import torch

    from dina_reward.backbones.pipelines import load_pipeline as open_pipeline

    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    with no_loading_bars():
        pipeline = open_pipeline(str(weights_dir(_known(world))), dtype=dtype, **kwargs)
    if world == "ddpm":
        # Convolutions of this size run half as fast again on a CPU in this layout.
        pipeline.unet.to(memory_format=torch.channels_last)
    return pipeline


def quiet_pipeline(directory: str | Path) -> Any:
    """A pipeline of the shapes world from a directory, without progress bars."""
    from dina_reward.backbones.pipelines import load_pipeline as open_pipeline

    pipeline = open_pipeline(str(directory))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_reward(world: str = "flow", **kwargs: Any) -> LatentReward:
    """The shipped reward of a world; `kwargs`, for example `pipeline=`, go to `LatentReward.from_pretrained`."""
    from dina_reward import LatentReward

    return LatentReward.from_pretrained(weights_dir(f"{_known(world)}-reward"), **kwargs)


def load_aligned(world: str = "flow") -> Tensor:
    """Latents, shape (count, 8, 8, 8), of generators that were aligned with provisional rewards, without restraint.

    They are what such a generator offers a reward that it has found out, for held-out prompts: hard cases for an evaluation.

    Args:
        world (str): "flow" or "ddpm".
    """
    from safetensors.torch import load_file

    return load_file(weights_dir(f"{_known(world)}-aligned") / "held_out.safetensors")["latents"].float()


def _known(world: str) -> str:
    if world not in SHIPPED:
        raise ValueError(f"No world called {world!r}; there are: {', '.join(SHIPPED)}.")
    return world
