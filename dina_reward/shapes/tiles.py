"""Samples as tiles of a figure, under each what its prompt asks for with the oracle's tick or cross."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.prompts import ATTRIBUTES, SHAPES, Scene
from dina_reward.shapes.renderer import IMAGE_SIZE


_EACH = 2
"""Prompts of each shape in a picture."""


def shown_prompts(prompts: Sequence[str]) -> list[int]:
    """Numbers of the prompts in the picture: the first `_EACH` of each shape, shape by shape."""
    shapes = [Scene.parse(prompt).shape for prompt in prompts]
    return [number for shape in SHAPES for number in [i for i, s in enumerate(shapes) if s == shape][:_EACH]]


def two_lines(prompt: str) -> str:
    """ "a large red circle on a white background" -> two short lines."""
    thing, background = prompt.removeprefix("a ").split(" on a ")
    return f"{thing}\non {background.removesuffix(' background')}"


def draw_tile(axes, tile: Image.Image, prompt: str) -> None:  # type: ignore[no-untyped-def]
    """A tile, and under it the four things that the prompt asks for, each with a tick or a cross."""
    axes.imshow(tile, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    side = min(tile.size)
    image = torch.from_numpy(np.array(tile.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)))
    right = Oracle()(image.permute(2, 0, 1)[None] / 255, [prompt]).attributes[0].tolist()
    scene = Scene.parse(prompt)
    for place, (name, fits) in enumerate(zip(ATTRIBUTES, right, strict=True)):
        row, column = divmod(place, 2)
        axes.text(
            side * (0.02 + 0.52 * column),
            side * (1.1 + 0.14 * row),
            f"{'✓' if fits else '✗'} {getattr(scene, name)}",
            color="tab:green" if fits else "tab:red",
            fontsize=9,
            va="center",
        )
