"""What a target of the sweep is: a function with right arguments, and the other kinds that are right for it, too."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dina_reward


PACKAGE = str(Path(dina_reward.__file__).parent)
NOTHING: frozenset[str] = frozenset({"None"})
SEEDS = NOTHING | {"0", "-1", "as array of objects"}
LEVELS = NOTHING | {"0"}
FLAGS = frozenset({"True"})
TEXT = frozenset({"text", "text of a number", "empty text"})
PROMPTS = TEXT | {"list of text"}


@dataclass(frozen=True)
class Target:
    """A function.

    Args:
        name: for the table.
        call: takes the arguments by keyword.
        right: makes an accepted value of each argument.
        fine: further kinds that an argument takes.
        alone: arguments that are left out where another one is swept.
    """

    name: str
    call: Callable[..., Any]
    right: Mapping[str, Callable[[], Any]]
    fine: Mapping[str, frozenset[str]] = field(default_factory=dict)
    alone: frozenset[str] = frozenset()


def raised(error: Exception) -> tuple[str, str]:
    """``clear`` if an error is the package's own word, ``unclear`` if it comes from the depth of a call; and its text."""
    raised_by = traceback.extract_tb(error.__traceback__)[-1].filename
    own = isinstance(error, ValueError) and raised_by.startswith(PACKAGE)
    message = str(error).splitlines()[0][:80] if str(error) else ""
    return "clear" if own else "unclear", f"{type(error).__name__}: {message}"
