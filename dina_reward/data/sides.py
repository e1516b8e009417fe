"""The two sides of a comparison: reading one from what a dataset stores, and naming it."""

from __future__ import annotations

import ast
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from dina_reward.checks.stored import parse_json
from dina_reward.data.files import decode_image, to_rgb


@dataclass(frozen=True)
class VideoFile:
    """A side that is a video on disk; reading a pair does not decode it.

    Args:
        path: file of the video.
    """

    path: Path

    def frames(self) -> list[Image.Image]:
        """Decodes all frames, RGB, in order. GIFs need nothing more, other formats the package ``imageio[ffmpeg]``.

        Raises:
            ValueError: the file is missing or no video.
            ImportError: no video library is installed; the message names it.
        """
        _check_file(self.path)
        from diffusers.utils import load_video

        try:
            return [frame.convert("RGB") for frame in load_video(str(self.path))]
        except (ImportError, AttributeError) as error:
            raise ImportError(f"decoding {self.path} needs imageio: pip install 'imageio[ffmpeg]'") from error
        except (OSError, RuntimeError, SyntaxError) as error:
            raise ValueError(f"{self.path} cannot be read as a video: {error}") from error


Side: TypeAlias = Image.Image | Tensor | VideoFile
_TEXTS = (pa.StringScalar, pa.LargeStringScalar, pa.StringViewScalar)
Stored: TypeAlias = Any
"""What a dataset holds for a side: path, bytes, ``{"bytes", "path"}``, image, or the numbers of a latent."""


def stored_value(column: Any, index: int = 0, position: int | None = None) -> Stored:
    """Takes one value out of an Arrow column; nested lists of numbers become an array that keeps their dtype.

    Args:
        column: a `pyarrow.Array` or `pyarrow.ChunkedArray`.
        index: row in the column.
        position: place inside the row's list, where the column holds lists of sides.
    """
    scalar = column[index]
    is_json = isinstance(scalar, pa.ExtensionScalar) and scalar.type.extension_name == "arrow.json"
    scalar = scalar.value if isinstance(scalar, pa.ExtensionScalar) else scalar
    if scalar is None or not scalar.is_valid:
        return None
    if is_json or (position is not None and isinstance(scalar, _TEXTS)):
        value = parse_json(scalar.as_py(), "the value")
        return value if position is None else value[position]
    if position is not None:
        scalar = scalar.values[position]
    is_list = isinstance(scalar, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar))
    return _numbers(scalar.values) if is_list else scalar.as_py()


def read_image(value: Stored, image_root: Path | None = None) -> Image.Image:
    """Decodes an image: RGB, upright as its EXIF says, at its own size.

    Args:
        value: path (relative ones start at ``image_root``), encoded bytes, ``{"bytes", "path"}``, or a PIL image.
        image_root: folder of relative paths.

    Raises:
        ValueError: there is no image, or it cannot be read; the message names its path.
    """
    if isinstance(value, Image.Image):
        return to_rgb(value)
    data, path = _bytes_and_path(value)
    file: Path | io.BytesIO
    if data is None:
        file = local_path(path, image_root)
        where = str(file)
        _check_file(file)
    else:
        file, where = io.BytesIO(data), f"{len(data)} bytes" + (f" of {path}" if path else "")
    return decode_image(file, where)


def read_video(value: Stored, image_root: Path | None = None) -> VideoFile:
    """Names the file of a video without opening it.

    Raises:
        ValueError: the value is no path.
    """
    data, path = _bytes_and_path(value)
    if data is not None:
        raise ValueError("the video is stored as bytes; videos are read from files, so write it to one")
    return VideoFile(local_path(path, image_root))


def read_latent(value: Stored, image_root: Path | None = None, shape: Any = None) -> Tensor:
    """Reads a latent of shape ``(channels, height, width)``.

    Args:
        value: an array, or the bytes of a ``.npy`` file (pickled arrays are refused).
        image_root: not used.
        shape: published shape of the latent, a list or the text of one; checked when given. A leading 1 is a batch.

    Raises:
        ValueError: not an array of finite floating point numbers, or of another shape.
    """
    del image_root
    if isinstance(value, bytes):
        try:
            value = np.load(io.BytesIO(value), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"the latent is no .npy array: {error}") from error
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        kind = f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"expected a latent, an array of floating point numbers, got {kind}")
    if shape is not None and published_shape(value.shape) != published_shape(shape):
        raise ValueError(f"the latent has shape {value.shape}, its row says {published_shape(shape)}")
    latent = torch.from_numpy(np.ascontiguousarray(value).copy())
    latent = latent if latent.dtype in (torch.float16, torch.float32) else latent.float()
    if latent.ndim == 4 and latent.shape[0] == 1:
        latent = latent[0]
    if latent.ndim < 2 or not bool(torch.isfinite(latent).all()):
        problem = "NaN or infinite values" if latent.ndim >= 2 else f"the shape {tuple(latent.shape)}"
        raise ValueError(f"the latent has {problem}; expected finite numbers of shape (channels, height, width)")
    return latent


def published_shape(shape: Any) -> tuple[int, ...]:
    """A shape that is a list or the text of one, without a batch dimension of 1.

    Raises:
        ValueError: it is neither.
    """
    try:
        numbers = tuple(int(n) for n in (ast.literal_eval(shape) if isinstance(shape, str) else shape))
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the published shape of a latent is no list of numbers: {str(shape)[:80]!r}") from error
    return numbers[1:] if len(numbers) == 4 and numbers[0] == 1 else numbers


def side_name(value: Stored) -> str:
    """Stable id of a side: its path where only that is stored, else a digest of its content.

    The path beside stored bytes is not used: in published files it is often the same for many images.
    """
    if isinstance(value, np.ndarray):
        return _digest(repr(value.shape).encode() + np.ascontiguousarray(value).tobytes())
    if isinstance(value, Image.Image):
        return _digest(repr((value.mode, value.size)).encode() + value.tobytes())
    data, path = _bytes_and_path(value)
    return path if data is None else _digest(data)


def local_path(path: str, image_root: Path | None) -> Path:
    """Path of a side on this machine.

    Raises:
        ValueError: it is a URL.
    """
    if "://" in path:
        raise ValueError(f"{path} is a URL; download the images and pass image_root=FOLDER")
    return Path(path) if image_root is None else image_root / path


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _check_file(path: Path) -> None:
    if not path.is_file():
        hint = "" if path.is_absolute() else "; pass image_root=FOLDER, the folder that relative paths start from"
        raise ValueError(f"{path} does not exist{hint}")


def _bytes_and_path(value: Stored) -> tuple[bytes | None, str]:
    """Splits what is stored for an image; without bytes there is a path."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if isinstance(data, str):
        data, path = None, data
    if data is None and not path:
        raise ValueError("there is no image: neither bytes nor a path")
    if data is not None and not isinstance(data, bytes):
        raise ValueError(f"expected an image (path, bytes or {{'bytes', 'path'}}), got {type(data).__name__}")
    return data, path or ""


def _numbers(values: Any) -> np.ndarray:
    """Array of a (nested) Arrow list; its lists must have equal lengths.

    Raises:
        ValueError: they do not, or hold other things than numbers.
    """
    shape = [len(values)]
    while pa.types.is_nested(values.type) and not pa.types.is_struct(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise ValueError(f"the latent's nested lists differ in length: {lengths}")
        shape.append(lengths[0])
        values = values.flatten()
    if values.null_count or not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise ValueError(f"the latent holds {values.null_count} nulls; values are of type {values.type}")
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(shape)
