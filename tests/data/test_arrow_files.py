from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dina_reward.data.arrow_files import (
    RaggedColumn,
    TensorColumn,
    fixed_column,
    numbers,
    open_arrow,
    tensor_bytes,
    write_arrow,
)


def write(path: Path, tensors: torch.Tensor, dtype: str) -> None:
    rows = [tensor_bytes(tensor, dtype) for tensor in tensors]
    columns = {"number": pa.array(range(len(rows)), pa.int64()), "latents": fixed_column(rows, len(rows[0]))}
    write_arrow(path, columns, {"dtype": dtype})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tensors_round_trip_in_any_order(tmp_path: Path, dtype: str) -> None:
    tensors = torch.randn(9, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    write(tmp_path / "a" / "x.arrow", tensors, dtype)
    batch = open_arrow(tmp_path / "a" / "x.arrow")
    column = TensorColumn(batch, "latents", (4, 3, 5), dtype)
    assert len(column) == 9
    expected = tensors.to(getattr(torch, dtype))
    for row in (8, 0, 5, 5):
        assert torch.equal(column[row], expected[row])
        widened = TensorColumn(batch, "latents", (4, 3, 5), dtype, torch.float32)[row]
        assert widened.dtype == torch.float32
        assert torch.equal(widened, expected[row].float())
        assert TensorColumn(batch, "latents", (4, 3, 5), dtype, torch.float64)[row].dtype == torch.float64
    column[0].zero_()  # a copy
    assert torch.equal(column[0], expected[0])
    assert numbers(batch, "number").tolist() == list(range(9))
    assert batch.schema.metadata[b"dtype"] == dtype.encode()


def test_rows_of_different_length(tmp_path: Path) -> None:
    tensors = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (3, 1, 0, 7)]
    masks = [torch.arange(len(tensor)) < 2 for tensor in tensors]
    columns = {
        "embeds": pa.array([tensor_bytes(tensor, "bfloat16") for tensor in tensors], pa.large_binary()),
        "mask": pa.array([mask.numpy().tobytes() for mask in masks], pa.large_binary()),
    }
    write_arrow(tmp_path / "x.arrow", columns)
    batch = open_arrow(tmp_path / "x.arrow")
    embeds, mask = RaggedColumn(batch, "embeds", "bfloat16", 6), RaggedColumn(batch, "mask", "bool")
    for row in (3, 1, 2, 0):
        assert torch.equal(embeds[row], tensors[row].bfloat16())
        assert torch.equal(mask[row], masks[row])
        assert torch.equal(RaggedColumn(batch, "embeds", "bfloat16", 6, torch.float32)[row], embeds[row].float())


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    tensors = torch.randn(5, 7)
    for name in ("one", "two"):
        write(tmp_path / name, tensors, "float16")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_open_files_cost_no_descriptor(tmp_path: Path) -> None:
    write(tmp_path / "x", torch.randn(5, 7), "float16")
    before = len(os.listdir("/proc/self/fd"))
    batches = [open_arrow(tmp_path / "x") for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(batches) == 20


def test_reading_one_row_reads_one_row(tmp_path: Path) -> None:
    """The memory map of a 64 MiB file makes next to nothing of it resident."""
    rows = [np.full(2**20, n, np.uint8).tobytes() for n in range(64)]
    write_arrow(tmp_path / "x", {"latents": fixed_column(rows, 2**20)})
    column = TensorColumn(open_arrow(tmp_path / "x"), "latents", (2**19,), "float16")
    row = column[40]
    with open("/proc/self/smaps") as smaps:
        lines = smaps.read().split(str(tmp_path / "x"))
    resident = sum(int(part.split("Rss:")[1].split()[0]) for part in lines[1:])
    assert resident < 4 * 1024
    assert row.view(torch.uint8).unique().tolist() == [40]


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"up to 70000 are not finite as float16; store them as bfloat16"):
        tensor_bytes(torch.tensor([1.0, 70000.0]), "float16")
    assert len(tensor_bytes(torch.tensor([1.0, 70000.0]), "bfloat16")) == 4
    with pytest.raises(ValueError, match="not finite"):
        tensor_bytes(torch.tensor([float("nan")]), "float32")


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing or damaged"):
        open_arrow(tmp_path / "x")
    write(tmp_path / "x", torch.randn(5, 7), "float16")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-20])
    with pytest.raises(ValueError, match="missing or damaged"):
        open_arrow(tmp_path / "x")
