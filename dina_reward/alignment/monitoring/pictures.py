"""Images of held-out samples: drawing them in a grid, sending the grid to trackers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers.utils import logging

from dina_reward.checkpoints.atomic import atomic_file


logger = logging.get_logger(__name__)

GRID_GAP = 4
"""Pixels between the images of a picture grid."""

_BORDER = "lightgray"
_MAX_CAPTION_LINES = 4


def picture_grid(
    images: Sequence[Tensor],
    prompts: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    *,
    score_name: str = "reward",
    min_side: int = 96,
    gap: int = GRID_GAP,
) -> Image.Image:
    """Images side by side with a thin border, in an almost square grid; small ones are enlarged pixel by pixel.

    Args:
        images: at least one, each of shape ``(3, height, width)``, in [0, 1].
        prompts: written under the images, wrapped; long ones are cut.
        scores: written under the prompts.
        score_name: what the scores are; written before each.
        min_side: the longer side of a tile has at least this many pixels.
        gap: pixels between tiles.

    Raises:
        ValueError: no images, or another number of prompts or scores.
    """
    for name, values in (("prompts", prompts), ("scores", scores)):
        if values is not None and len(values) != len(images):
            raise ValueError(f"got {len(values)} {name} for {len(images)} images; give one each")
    if not images:
        raise ValueError("there are no images to draw")
    columns = math.ceil(math.sqrt(len(images)))
    height, width = images[0].shape[-2:]
    factor = max(1, math.ceil(min_side / max(width, height)))
    width, height = width * factor, height * factor
    font = _font(max(10, width // 32))
    numbers = None if scores is None else [_named(score_name, score) for score in scores]
    captions = _captions(len(images), prompts, numbers, font, width)
    line_height = math.ceil(sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 11)
    pitch = height + max(map(len, captions)) * line_height + gap
    grid = Image.new("RGB", (columns * (width + gap) + gap, math.ceil(len(images) / columns) * pitch + gap), "white")
    pen = ImageDraw.Draw(grid)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        pixels = (image.detach().float().cpu().clamp(0, 1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        tile = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        left, top = gap + column * (width + gap), gap + row * pitch
        # Outside the tile, so that `grid_tiles` returns its pixels and white images have an edge on white.
        pen.rectangle((left - 1, top - 1, left + width, top + height), outline=_BORDER)
        grid.paste(tile, (left, top))
        for line, text in enumerate(captions[number]):
            pen.text((left, top + height + line * line_height), text, fill="black", font=font)
    return grid


def grid_tiles(grid: Image.Image, total: int, count: int | None = None, *, gap: int = GRID_GAP) -> list[Image.Image]:
    """The first ``count`` images, without captions, of a grid that `picture_grid` has made of ``total`` square images."""
    columns = math.ceil(math.sqrt(total))
    side = (grid.width - gap) // columns - gap
    pitch = (grid.height - gap) // math.ceil(total / columns)
    places = [divmod(number, columns) for number in range(total if count is None else count)]
    corners = [(gap + column * (side + gap), gap + row * pitch) for row, column in places]
    return [grid.crop((x, y, x + side, y + side)) for x, y in corners]


def save_picture(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes a PNG; never a partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staging:
        picture.save(staging, format="PNG")


def log_pictures(
    trainer: Any, step: int, picture: Image.Image, caption: str = "", *, name: str = "eval/samples"
) -> list[str]:
    """Sends a picture to the trackers among the trainer's callbacks: TensorBoard, Weights & Biases, trackio.

    The callbacks are those that `transformers` makes for ``report_to``; nothing is imported. A tracker that has not been
    started (before training, on other ranks) is passed over, and one that fails is only warned about.

    Args:
        trainer: a `transformers.Trainer`, or a list of callbacks.
        step: optimizer steps made.
        picture: the image.
        caption: text that goes with it.
        name: tag under which trackers show it.

    Returns:
        The trackers that took the picture.
    """
    handler = getattr(trainer, "callback_handler", None)
    reached = []
    for callback in trainer if handler is None else handler.callbacks:
        for tracker, send in _SENDERS.items():
            try:
                if send(callback, step, picture, caption, name):
                    reached.append(tracker)
            except Exception as error:
                logger.warning(f"{tracker} did not take the picture of step {step}: {type(error).__name__}: {error}")
    return reached


def _send_to_tensorboard(callback: Any, step: int, picture: Image.Image, caption: str, name: str) -> bool:
    writer = getattr(callback, "tb_writer", None)
    if writer is None:
        return False
    writer.add_image(name, np.asarray(picture.convert("RGB")), global_step=step, dataformats="HWC")
    if caption:
        writer.add_text(f"{name}/caption", caption, global_step=step)
    return True


def _send_to_wandb(callback: Any, step: int, picture: Image.Image, caption: str, name: str) -> bool:
    wandb = getattr(callback, "_wandb", None)
    if wandb is None or getattr(wandb, "run", None) is None:
        return False
    wandb.log({name: wandb.Image(picture, caption=caption), "train/global_step": step})
    return True


def _send_to_trackio(callback: Any, step: int, picture: Image.Image, caption: str, name: str) -> bool:
    trackio = getattr(callback, "_trackio", None)
    if trackio is None or not getattr(callback, "_initialized", False):
        return False
    trackio.log({name: trackio.Image(picture, caption=caption), "train/global_step": step})
    return True


_SENDERS = {"tensorboard": _send_to_tensorboard, "wandb": _send_to_wandb, "trackio": _send_to_trackio}

_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def _font(size: int) -> _Font:
    try:
        return ImageFont.load_default(size)
    except (ImportError, TypeError):  # Pillow without FreeType, or older than 10.1
        return ImageFont.load_default()


def _named(name: str, score: float) -> str:
    return f"no {name}" if math.isnan(score) else f"{name} {score:.4g}"


def _captions(
    count: int, prompts: Sequence[str] | None, numbers: Sequence[str] | None, font: _Font, width: int
) -> list[list[str]]:
    captions: list[list[str]] = [[] for _ in range(count)]
    for texts in (prompts, numbers):
        for lines, text in zip(captions, texts or (), strict=texts is not None):
            lines += wrap_text(text, font, width)
    return captions


def wrap_text(text: str, font: _Font, width: int) -> list[str]:
    """Lines of at most ``width`` pixels, broken at spaces where possible; after four lines the rest becomes an ellipsis."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        text = text.encode("latin-1", "replace").decode("latin-1")
    lines, line = [], ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        lines += [line] if line else []
        line = word
        while len(line) > 1 and font.getlength(line) > width:
            fitting = max(n for n in range(1, len(line)) if n == 1 or font.getlength(line[:n]) <= width)
            lines.append(line[:fitting])
            line = line[fitting:]
    lines += [line] if line else []
    if len(lines) > _MAX_CAPTION_LINES:
        lines = lines[:_MAX_CAPTION_LINES]
        last = lines[-1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines[-1] = f"{last}..."
    return lines
