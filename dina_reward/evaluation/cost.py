"""What scoring costs: seconds by the clock and the peak of memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """Cost of one scorer on one dataset.

    Args:
        seconds_per_1000: of scoring 1,000 samples in each setting, prompt encoding included.
        prepare_seconds_per_1000: of encoding images or decoding latents before; 0 where nothing had to be done.
        peak_memory: bytes, highest while the dataset was scored, with the weights.
        memory_kind: what ``peak_memory`` counts: ``"cuda"`` (allocated by torch) or ``"process"`` (resident set).
        samples: samples scored.
        batch_size: samples per pass.
        device: name of the device.
    """

    seconds_per_1000: dict[str, float]
    prepare_seconds_per_1000: float
    peak_memory: int
    memory_kind: str
    samples: int
    batch_size: int
    device: str


@contextmanager
def timed() -> Iterator[list[float]]:
    """Appends the seconds that the body took, all work of the accelerator included, to the list it gives."""
    result: list[float] = []
    _synchronize()
    start = time.perf_counter()
    yield result
    _synchronize()
    result.append(time.perf_counter() - start)


def reset_peak_memory() -> None:
    """Starts a new measurement of the peak; where the system cannot, the peak is that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_memory() -> tuple[int, str]:
    """Bytes and what they count, see `Cost`."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated()), "cuda"
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024, "process"
    try:
        import resource
    except ImportError:
        return 0, "unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, "process"


def device_name(device: torch.device) -> str:
    """Name of a device for a report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
