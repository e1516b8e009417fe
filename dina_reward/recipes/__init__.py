"""What the scripts in ``recipes/`` share: arguments, configuration files, and how models, rewards and data are loaded.

No algorithm is implemented here, and importing this package loads neither torch nor diffusers. Begin at
`alignment.align`, which is what every alignment recipe does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.recipes.alignment import RecipeArguments, align

__getattr__, __dir__, __all__ = lazy_exports(__name__)


def _prompts_of(name: str, split: str) -> Sequence[Any]:
    """`alignment.prompts_of`, by the name that it had while recipes were one module."""
    from dina_reward.recipes.alignment import prompts_of

    return prompts_of(name, split)
