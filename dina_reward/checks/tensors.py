"""Checks of tensors, for every entry alike: what kind they are costs nothing, what they hold is read where asked for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def check_tensor(name: str, value: Any, advice: str = "") -> None:
    """Refuses what is no tensor, such as lists and numpy arrays.

    Raises:
        ValueError: naming what was given.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}{advice and f'; {advice}'}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuses tensors that few operations take: sparse ones, and numbers of 8 bits.

    Raises:
        ValueError: naming layout and dtype.
    """
    if tensor.layout != torch.strided or str(tensor.dtype).startswith("torch.float8"):
        raise ValueError(f"{name} must be dense and of at least 16 bits, got {tensor.layout} of {tensor.dtype}")


def check_numbers(name: str, value: Any, *, floating: bool = False) -> None:
    """Refuses what is no dense tensor of real numbers; truth values are no numbers. The values are not looked at.

    Args:
        name: of the argument.
        value: what was given for it.
        floating: refuse integers as well.

    Raises:
        ValueError: naming type, dtype, layout or device.
    """
    check_tensor(name, value)
    check_dense(name, value)
    if value.is_complex() or value.is_quantized or value.dtype == torch.bool:
        raise ValueError(f"{name} must be real numbers, got {value.dtype}")
    if floating and not value.is_floating_point():
        raise ValueError(f"{name} must be floating-point numbers, got {value.dtype}")
    if value.is_meta:
        raise ValueError(f"{name} holds no values: it is on the device 'meta'")


def check_values_on_cpu(name: str, value: Tensor, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuses NaN, infinities and numbers out of a closed range, in tensors on the CPU alone.

    For functions inside a training step: on an accelerator a look at the values would wait for the device in every call.

    Raises:
        ValueError: with the first value that is wrong, and its place.
    """
    if value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    values = value.detach()
    right = torch.isfinite(values) & (values >= low) & (values <= high)
    if not bool(right.all()):
        place = (~right).nonzero()[0].tolist()
        found = float(values[tuple(place)])
        limits = "" if low == -math.inf and high == math.inf else f" and lie in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be finite{limits}, got {found:g} at {place}")
