"""Says when a reward applies to no sample of a generation, and stops a run in which none does for long."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)

PATIENCE = 5
"""Generations in a row, without a single reward, after which a run stops."""


class SilentRewards:
    """Watches the scores of all ranks, which are NaN where a reward function does not apply.

    Args:
        names: of the reward functions.
        weights: of the reward functions; those of weight 0 teach nothing in any case.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float]) -> None:
        self._names = list(names)
        self._weights = list(weights)
        self._said: set[str] = set()
        self._silent_for = 0

    def check(self, generation: int, scores: Tensor) -> bool:
        """Warns once per function, and once when nothing is learned.

        Args:
            generation: its number, for messages.
            scores: shape ``(rows, functions)``, NaN for "does not apply".

        Returns:
            Whether some function with a weight applied to some row.

        Raises:
            ValueError: it did not, for the last `PATIENCE` generations.
        """
        silent = scores.isnan().all(dim=0).tolist()
        rows = f"the {len(scores)} samples of generation {generation}"
        for name, is_silent in zip(self._names, silent, strict=True):
            if is_silent and name not in self._said:
                self._said.add(name)
                logger.warning(
                    f"The reward {name} applies to none of {rows} (it returned None for all), so nothing is learned from it."
                )
        heard = any(weight and not quiet for weight, quiet in zip(self._weights, silent, strict=True))
        self._silent_for = 0 if heard else self._silent_for + 1
        if self._silent_for >= PATIENCE:
            raise ValueError(
                f"no reward function has applied to any sample of the last {PATIENCE} generations, so nothing is learned; "
                f"make one of {', '.join(self._names)} return numbers for these prompts"
            )
        return heard
