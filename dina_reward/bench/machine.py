"""What a machine can do at best: its own measured rate of matrix products and of memory, the two roofs of a roofline."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}
"""Side of the square matrices whose product is timed: large enough that nothing but arithmetic counts."""

WARM_UP = 10
"""Calls that warm up, at most: allocators, caches and gradients have their sizes by then."""

COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}


@dataclass(frozen=True)
class Machine:
    """A device and its roofs.

    Args:
        device: its name.
        device_type: ``"cuda"`` or ``"cpu"``.
        threads: of torch on the CPU.
        dtype: of the matrix products.
        matrix_rate: FLOP/s of the product of two large matrices; a multiply-add counts as two.
        memory_rate: bytes/s read and written while a large tensor is copied.
        torch: its version.
    """

    device: str
    device_type: str
    threads: int
    dtype: str
    matrix_rate: float
    memory_rate: float
    torch: str

    def attainable(self, flops: float, bytes_read: float) -> float:
        """FLOP/s that work of so many FLOPs can reach if it has to read so many bytes (the roofline)."""
        return min(self.matrix_rate, flops / max(bytes_read / self.memory_rate, 1e-12))


def measure_machine(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Machine:
    """Measures both roofs, each for about so many seconds, and takes the best of the calls."""
    side = MATRIX_SIDE.get(device.type, 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(COPY_BYTES.get(device.type, 2**28), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    matrix = min(durations(lambda: a @ b, device, seconds))
    copy = min(durations(lambda: target.copy_(source), device, seconds))
    return Machine(
        device=device_name(device),
        device_type=device.type,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        matrix_rate=2 * side**3 / matrix,
        memory_rate=2 * source.numel() / copy,
        torch=torch.__version__,
    )


def durations(
    run: Callable[[], Any],
    device: torch.device,
    seconds: float,
    least: int = 3,
    most: int = 200,
    slow_once: bool = False,
) -> list[float]:
    """Seconds of single calls: at least ``least``, and more until ``seconds`` are over.

    Calls that warm up come before, until half of ``seconds`` are over, `WARM_UP` of them at most. With ``slow_once`` a first
    call that takes longer than ``seconds`` is the only one.
    """
    first = _timed(run, device)
    if slow_once and first > seconds > 0:
        return [first]
    warm = [first]
    while sum(warm) < seconds / 2 and len(warm) < WARM_UP:
        warm.append(_timed(run, device))
    found: list[float] = []
    while len(found) < most and (len(found) < least or sum(found) < seconds):
        found.append(_timed(run, device))
    return found


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def spread(values: list[float]) -> float | None:
    """Half the distance between the quartiles; ``None`` below three values."""
    if len(values) < 3:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def synchronize(device: torch.device) -> None:
    """Waits for all work of an accelerator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The model name of an accelerator or a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"
