"""The command ``dina-reward``: `app` lists its commands, and each has a file of its own.

Commands read arguments and print; what they do is done by the packages below, which never import this one.
Begin at `app`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dina_reward.lazy import lazy_exports


if TYPE_CHECKING:
    from dina_reward.cli.app import main

__getattr__, __dir__, __all__ = lazy_exports(__name__)
