"""Wrong values of every kind: those that are wrong almost anywhere, and those made of a right one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


ANYWHERE: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1.5": lambda: 1.5,
    "NaN": lambda: math.nan,
    "infinity": lambda: math.inf,
    "2**70": lambda: 2**70,
    "text": lambda: "x",
    "text of a number": lambda: "1",
    "empty text": lambda: "",
    "half a character": lambda: "\ud800",
    "bytes": lambda: b"x",
    "path": lambda: Path("no/such/place"),
    "empty list": list,
    "list of None": lambda: [None, None],
    "list of text": lambda: ["x", "y"],
    "nested list": lambda: [[1.0], [2.0]],
    "dict": lambda: {0: 1, 1: 2},
    "set": lambda: {1, 2},
    "generator": lambda: (number for number in (1, 2)),
    "object": object,
    "function": lambda: lambda: None,
    "class": lambda: Tensor,
    "module": lambda: torch.nn.Linear(1, 1),
    "array of objects": lambda: np.array([None, "x"], dtype=object),
    "tensor of another shape": lambda: torch.zeros(7, 5, 3),
}


def variants(right: Any) -> Iterator[tuple[str, Any]]:
    """Values that are nearly right."""
    if isinstance(right, Tensor):
        yield from _tensors(right)
    elif isinstance(right, list):
        yield "one item less", right[:-1]
        yield "one item more", [*right, right[-1]]
        yield "one item None", [*right[:-1], None]
        yield "as generator", iter(right)
        yield "as dict", dict.fromkeys(range(len(right)))
        yield "as array of objects", np.array(right, dtype=object)


def _tensors(right: Tensor) -> Iterator[tuple[str, Any]]:
    yield "as array", right.numpy()
    yield "as list", right.tolist()
    yield "as bool", right.bool()
    yield "as complex", right.to(torch.complex64)
    yield "as float8", right.float().to(torch.float8_e4m3fn)
    yield "sparse", right.to_sparse()
    yield "on another device", right.to("meta")
    yield "no rows", right[:0]
    yield "one row less", right[:-1]
    yield "one dimension more", right[None]
    yield "one dimension less", right[0]
    if right.is_floating_point():
        yield "as int", right.int()
        yield "holding NaN", torch.full_like(right, math.nan)
        yield "holding infinity", torch.full_like(right, math.inf)
