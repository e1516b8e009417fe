"""Small files in the published schemas. An image's colour is its number, so that a test sees which one it got."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dina_reward.data import Preference, PreferenceReader


def png(number: int, size: tuple[int, int] = (4, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number, 0, 0)).save(file, format="PNG")
    return file.getvalue()


def write_image(path: Path, number: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(number))
    return path.name


def write_json(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(json.dumps(list(rows), ensure_ascii=False), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def number(side: Any) -> int:
    """The number of an image made by `png`."""
    assert isinstance(side, Image.Image)
    assert side.mode == "RGB"
    return int(side.getpixel((0, 0))[0])  # type: ignore[index]


def first_preferred(preference: Preference, first: object, side: Any = number) -> float:
    """Probability that the side ``first`` is preferred, whichever side it is shown on."""
    shown = side(preference.a), side(preference.b)
    assert first in shown
    return preference.p_a if shown[0] == first else 1 - preference.p_a


def all_pairs(reader: PreferenceReader) -> list[Preference]:
    return [reader[index] for index in range(len(reader))]
