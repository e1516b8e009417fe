"""Public names that load on first use (PEP 562), so that importing a package costs nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Args:
        package: the package's ``__name__``.
        exports: public names by the sub-module that defines them; a leading dot stands for the package above.

    Raises:
        ValueError: a name is that of a sub-module, which would take its place once it is imported.
    """
    modules = {name: module for module, names in exports.items() for name in names}
    if clashes := modules.keys() & modules.values():
        raise ValueError(f"{package} exports names of its own sub-modules: {sorted(clashes)}; import them eagerly")

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{modules[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names, sorted(modules)
