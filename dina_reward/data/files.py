"""The one way in which files of images and of text are read: right, or refused with a reason that names them."""

from __future__ import annotations

import codecs
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from dina_reward.checks.values import is_text


_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as that of UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_image(file: Path | io.BytesIO, where: str) -> Image.Image:
    """An image file: RGB, 8 bits, upright as its EXIF says, at its own size. A damaged EXIF block is ignored.

    Args:
        where: what is read, for messages.

    Raises:
        ValueError: it cannot be read, or its numbers have no known meaning as brightness.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(upright(image))
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise ValueError(f"the image cannot be read ({where}): {error or type(error).__name__}") from error


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged block says nothing
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB: 16 bits become 8, floating point numbers in [0, 1] as well.

    Raises:
        ValueError: numbers of another range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _gray(np.asarray(image).astype(np.float64) / 257)
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if image.mode == "I" or not 0 <= low <= high <= 1:
            raise ValueError(
                f"its values of mode {image.mode!r} lie in [{low:g}, {high:g}], whose brightness is unknown; store it in "
                "8 or 16 bits"
            )
        return _gray(values.astype(np.float64) * 255)
    return image.convert("RGB")


def text_encoding(path: str | os.PathLike[str]) -> str:
    """Encoding of a text file by its first bytes: UTF-8, with or without BOM, unless they are the BOM of another."""
    with open(path, "rb") as file:
        start = file.read(4)
    return next((name for bom, name in _BOMS if start.startswith(bom)), "utf-8-sig")


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """Lines of a text file that are not blank, without the space around them; they end at line feeds alone.

    Raises:
        ValueError: there is no such file, or a line is not in the file's encoding.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected a text file with one entry per line")
    encoding = text_encoding(path)
    with path.open(encoding=encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "strict") as file:
        try:
            lines = [line.strip() for line in file]
        except UnicodeError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not is_text(line):
            raise ValueError(f"line {number} of {path} is not UTF-8: {line[:60]!r}; save the file as UTF-8")
    return [line for line in lines if line]


def _gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(values.round(), 0, 255).astype(np.uint8)).convert("RGB")
