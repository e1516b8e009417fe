"""Arrow files with random access: one record batch per file, written whole or not at all, read through a memory map.

Why Arrow IPC files and not parquet: parquet compresses row groups, so that one row costs a whole group. Here a column of
fixed-size rows is one stretch of the file; row ``i`` is found by a multiplication and costs only its own pages, which the
operating system shares between all loader processes. Any Arrow reader opens the files. Latents are stored as bytes of a
recorded dtype, because Arrow has no bfloat16.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dina_reward.checkpoints.atomic import atomic_file


STORED_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NUMPY_DTYPES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}


def write_arrow(path: Path, columns: Mapping[str, pa.Array], metadata: Mapping[str, str] | None = None) -> None:
    """Writes columns of one length as an Arrow IPC file; equal columns give equal bytes."""
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    schema = pa.schema(fields, metadata=dict(metadata or {}))
    batch = pa.record_batch(list(columns.values()), schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as staging, pa.OSFile(str(staging), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def open_arrow(path: str | os.PathLike[str]) -> pa.RecordBatch:
    """Maps a file that `write_arrow` wrote; nothing is read until a row is asked for, and no file stays open.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).get_batch(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def tensor_bytes(tensor: Tensor, dtype: str) -> bytes:
    """Content of a tensor in a stored dtype.

    Raises:
        ValueError: a value is not finite in that dtype.
    """
    stored = tensor.detach().to("cpu", STORED_DTYPES[dtype]).contiguous()
    if not bool(torch.isfinite(stored).all()):
        largest = float(tensor.detach().abs().max())
        raise ValueError(f"values up to {largest:g} are not finite as {dtype}; store them as bfloat16 or float32")
    return stored.view(torch.uint8).numpy().tobytes() if stored.numel() else b""


def fixed_column(rows: Sequence[bytes], width: int) -> pa.Array:
    """Column of rows that all have ``width`` bytes."""
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(width), len(rows), [None, pa.py_buffer(b"".join(rows))], null_count=0
    )


class TensorColumn:
    """Rows of a fixed-size column as tensors of one shape.

    Args:
        batch: a mapped file.
        name: the column.
        shape: shape of one row.
        stored: stored dtype, a key of `STORED_DTYPES`.
        dtype: of the tensors; ``None`` for the stored one.
    """

    def __init__(
        self, batch: pa.RecordBatch, name: str, shape: Sequence[int], stored: str, dtype: torch.dtype | None = None
    ) -> None:
        self._stored, self._dtype = stored, dtype
        column = batch.column(name)
        count = len(column) * int(np.prod(shape))
        self._rows = np.frombuffer(column.buffers()[1], _NUMPY_DTYPES[stored], count).reshape(len(column), *shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        """A copy of one row."""
        return _tensor(self._rows[index], self._stored, self._dtype)


class RaggedColumn:
    """Rows of a variable-size column as tensors of shape ``(length, channels)``, or ``(length,)`` without channels.

    Args:
        batch: a mapped file.
        name: the column, of large binary type.
        stored: stored dtype, or ``"bool"``.
        channels: size of the last dimension; ``None`` for vectors.
        dtype: of the tensors; ``None`` for the stored one. Booleans stay booleans.
    """

    def __init__(
        self,
        batch: pa.RecordBatch,
        name: str,
        stored: str,
        channels: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._stored, self._dtype = stored, dtype
        kind = np.dtype(np.bool_ if stored == "bool" else _NUMPY_DTYPES[stored])
        column = batch.column(name)
        _, offsets, data = column.buffers()
        self._offsets = (np.frombuffer(offsets, np.int64, len(column) + 1) // kind.itemsize).tolist()
        self._data = np.frombuffer(data, kind, self._offsets[-1])
        self._shape = (-1,) if channels is None else (-1, channels)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        """A copy of one row."""
        row = self._data[self._offsets[index] : self._offsets[index + 1]]
        return _tensor(row.reshape(self._shape), self._stored, self._dtype)


def _tensor(row: np.ndarray, stored: str, dtype: torch.dtype | None) -> Tensor:
    """A copy; numpy's conversion to float32 takes a quarter of the time of torch's on tensors this small."""
    if stored == "bool":
        return torch.from_numpy(row.copy())
    if dtype != torch.float32:
        return torch.from_numpy(row.copy()).view(STORED_DTYPES[stored]).to(dtype or STORED_DTYPES[stored])
    if stored == "bfloat16":
        return torch.from_numpy((row.astype(np.uint32) << 16).view(np.float32))
    return torch.from_numpy(row.astype(np.float32))


def numbers(batch: pa.RecordBatch, name: str) -> Any:
    """A numeric column as a read-only numpy array over the memory map."""
    return batch.column(name).to_numpy(zero_copy_only=True)
