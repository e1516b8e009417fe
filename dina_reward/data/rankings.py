"""Rankings of several images of one prompt, as benchmarks publish them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from dina_reward.data.pairs import Rankings
from dina_reward.data.sides import Side


@dataclass(frozen=True)
class Ranking:
    """Images of one prompt and the rank that people gave each.

    Args:
        prompt: text.
        group: id of the ranking; the pairs made from it carry the same.
        names: stable ids of the images.
        ranks: lower is better; ties and gaps occur.
        image: reads the image of that number.
        columns: further columns of the dataset, of the first image's row.
    """

    prompt: str
    group: str
    names: tuple[str, ...]
    ranks: tuple[float, ...]
    image: Callable[[int], Side]
    columns: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)


class RankingList(Sequence[Ranking]):
    """All rankings of a dataset, made when asked for.

    Args:
        rankings: where their images are and their ranks.
        make: makes one from its row, its items' rows and positions, and its ranks.
    """

    def __init__(
        self, rankings: Rankings, make: Callable[[int, np.ndarray, np.ndarray | None, np.ndarray], Ranking]
    ) -> None:
        self._rankings, self._make = rankings, make

    def __len__(self) -> int:
        return len(self._rankings.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Ranking: ...

    @overload
    def __getitem__(self, index: slice) -> list[Ranking]: ...

    def __getitem__(self, index: int | slice) -> Ranking | list[Ranking]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"ranking {index} of {len(self)}")
        flat = self._rankings
        items = slice(*flat.offsets[index % len(self) : index % len(self) + 2].tolist())
        positions = None if flat.positions is None else flat.positions[items]
        return self._make(int(flat.rows[items][0]), flat.rows[items], positions, flat.ranks[items])
