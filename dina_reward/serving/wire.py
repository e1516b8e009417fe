"""Safetensors from strangers: the header is checked to the last byte before anything is allocated for the tensors.

A body is eight bytes (little endian) that say how long the header is, the header in JSON, and the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dina_reward.checks.stored import parse_json
from dina_reward.checks.values import is_int
from dina_reward.serving.errors import RequestError, malformed


PREFIX = 8
"""Bytes in front of the header."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
"""Dtypes that a body may hold, by their names in the header."""

_MAX_TENSORS = 16
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in the data.

    Args:
        dtype: its dtype.
        shape: its shape.
        start, stop: bytes from the beginning of the data.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header.

    Args:
        tensors: places by name; they cover the data without gap or overlap.
        metadata: texts by name.
        data_bytes: length of the data.
    """

    tensors: Mapping[str, TensorPlace]
    metadata: Mapping[str, str]
    data_bytes: int


def header_length(prefix: bytes | bytearray, limit: int) -> int:
    """Length of the header.

    Args:
        prefix: the first eight bytes.
        limit: longest header that is read.

    Raises:
        RequestError: it is longer, or of no bytes.
    """
    length = int.from_bytes(prefix[:PREFIX], "little")
    if not 2 <= length <= limit:
        raise malformed(f"a header of {length} bytes", f"safetensors with a header of at most {limit} bytes")
    return length


def parse_header(text: bytes | bytearray) -> Header:
    """Reads and checks a header: names, dtypes, shapes, and that offsets fit shapes and cover the data.

    Raises:
        RequestError: 400 with the fault.
    """
    try:
        values = parse_json(bytes(text), "the header")
    except ValueError as error:
        raise malformed(str(error)[:200], "a header in JSON") from None
    if not isinstance(values, dict):
        raise malformed(f"a header that is a {type(values).__name__}", "a JSON object")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise malformed("__metadata__ that is no object of texts", "texts by name")
    if not 1 <= len(values) <= _MAX_TENSORS:
        raise malformed(f"{len(values)} tensors", f"from 1 to {_MAX_TENSORS}")
    places = {name: _place(name, entry) for name, entry in values.items()}
    position = 0
    for name, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != position:
            raise malformed(
                f"{_quoted(name)} from byte {place.start}", f"data without gap or overlap, here {position}"
            )
        position = place.stop
    return Header(places, metadata, position)


def tensor_at(data: bytearray, place: TensorPlace) -> Tensor:
    """A tensor of the data, without a copy where its alignment allows."""
    dtype = torch.uint8 if place.dtype == torch.bool else place.dtype
    count, start = math.prod(place.shape), place.start
    if count == 0:
        return torch.empty(place.shape, dtype=place.dtype, device="cpu")
    if start % dtype.itemsize:
        data, start = bytearray(memoryview(data)[start : place.stop]), 0
    tensor = torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(place.shape)
    return tensor != 0 if place.dtype == torch.bool else tensor


def _place(name: str, entry: Any) -> TensorPlace:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise malformed(f"{_quoted(name)} without dtype, shape and data_offsets", "these three for every tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise malformed(f"{_quoted(name)} of dtype {dtype!r:.40}", f"one of {', '.join(DTYPES)}")
    lists = isinstance(shape, list) and isinstance(offsets, list)
    if not lists or not all(is_int(size) and size >= 0 for size in (*shape, *offsets)):
        raise malformed(f"{_quoted(name)} with sizes or offsets that are no counts", "lists of integers")
    if len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
        raise malformed(
            f"{_quoted(name)} with {len(shape)} dimensions and {len(offsets)} offsets",
            f"at most {_MAX_DIMENSIONS} dimensions and two offsets",
        )
    length = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != length:
        raise malformed(
            f"{_quoted(name)} of {length} bytes by its shape, {offsets[1] - offsets[0]} by its offsets", "the same"
        )
    return TensorPlace(DTYPES[dtype], tuple(shape), *offsets)


def _quoted(name: str) -> str:
    return f"tensor {name[:40]!r}"


def check_size(header_bytes: int, header: Header, declared: int | None, limit: int) -> None:
    """Compares what the header says with the length that the request declares, and both with the limit.

    Args:
        header_bytes: length of the header.
        header: the header.
        declared: ``Content-Length``, where there is one.
        limit: largest body.

    Raises:
        RequestError: 413 or 400.
    """
    total = PREFIX + header_bytes + header.data_bytes
    if total > limit:
        raise too_large(total, limit)
    if declared is not None and declared != total:
        raise malformed(f"a body of {declared} bytes by its Content-Length, {total} by its header", "the same")


def too_large(size: int, limit: int) -> RequestError:
    """A body beyond the limit."""
    return RequestError(
        413,
        "body_too_large",
        given=f"a body of at least {size} bytes",
        expected=f"at most {limit} bytes",
        do="send fewer rows per request, and each prompt's embeddings once",
    )
