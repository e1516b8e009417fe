"""Conditions that a device finds out, read once: asking for each in turn would make the host wait as often."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class LateChecks:
    """Collects conditions while work goes on, and reads all of them when the results are needed anyway.

    Examples:
        >>> late = LateChecks()
        >>> late.add(torch.isfinite(latents), lambda: ValueError("latents are not finite"))
        >>> scores = latents.mean(dim=(1, 2, 3))
        >>> late.settle()  # the host waits here, and nowhere before
    """

    def __init__(self) -> None:
        self._conditions: list[tuple[Tensor, Callable[[], Exception]]] = []

    def add(self, holds: Tensor, error: Callable[[], Exception]) -> None:
        """Notes a condition that is to hold.

        Args:
            holds: true where it does, any shape, on the device of the others.
            error: makes what is raised if it does not hold everywhere; it may look at the tensors.
        """
        self._conditions.append((holds.detach().all(), error))

    def settle(self) -> None:
        """Raises the error of the first condition that does not hold; the others are not looked at."""
        if not self._conditions:
            return
        conditions, self._conditions = self._conditions, []
        known: list[bool] = torch.stack([holds for holds, _ in conditions]).tolist()
        for held, (_, error) in zip(known, conditions, strict=True):
            if not held:
                raise error()
