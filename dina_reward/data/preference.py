"""The canonical preference: one prompt, two sides, and how sure people are that the first side is the better one.

Readers (`dina_reward.data.read_preferences`) turn every published schema into this record; the latent cache turns it
into training rows (`dina_reward.data.records`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dina_reward.data.sides import Side


@dataclass(frozen=True)
class Preference:
    """One comparison of two generations for one prompt.

    Args:
        prompt: text both sides were generated for.
        a, b: the sides: an RGB image, a latent of shape ``(channels, height, width)``, or a
            `dina_reward.data.sides.VideoFile`.
        p_a: probability in ``[0, 1]`` that ``a`` is preferred: 1 and 0 are certain, 0.5 is a tie, others are soft labels.
        weight: factor of the pair's loss, finite and not negative.
        source: where the pair comes from, e.g. the two generators; accuracy can be reported for each source.
        group: id of the prompt or ranking; pairs that share it are not independent.
        a_name, b_name: stable ids of the sides (path or uid), the same wherever the same image occurs.
        columns: further columns of the dataset, such as the prompt's category; an evaluation reports by their values.
    """

    prompt: str
    a: Side
    b: Side
    p_a: float
    weight: float = 1.0
    source: str = ""
    group: str = ""
    a_name: str = ""
    b_name: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.p_a <= 1:
            raise ValueError(f"p_a must lie in [0, 1], got {self.p_a} (prompt {self.prompt!r})")
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight must be finite and not negative, got {self.weight} (prompt {self.prompt!r})")

    def training_row(self, chosen: Any = None, rejected: Any = None) -> dict[str, Any]:
        """The row that trainers read: ``a`` becomes ``chosen``, ``b`` ``rejected`` and ``p_a`` ``p_chosen``.

        Args:
            chosen, rejected: latents of ``a`` and ``b``; the sides themselves when not given.
        """
        return {
            **self.columns,
            "prompt": self.prompt,
            "chosen": self.a if chosen is None else chosen,
            "rejected": self.b if rejected is None else rejected,
            "p_chosen": self.p_a,
            "weight": self.weight,
            "source": self.source,
            "group": self.group,
        }
