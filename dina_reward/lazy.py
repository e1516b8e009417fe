"""Public names that load on first use (PEP 562), so that importing a package costs nothing.

What needs a library of an extra says which `pip install` brings it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


EXTRAS = {
    "bitsandbytes": "train",
    "datasets": "train",
    "matplotlib": "train",
    "prometheus_client": "serve",
    "pyarrow": "train",
    "rich": "train",
    "starlette": "serve",
    "trl": "train",
    "typer": "train",
    "uvicorn": "serve",
}
"""Libraries that the base installation leaves out, and the extra that brings each; no module that is imported needs more."""


class MissingExtraError(ModuleNotFoundError):
    """A library is not installed that comes with an extra; the message says how to install it."""


def missing_extra(error: ModuleNotFoundError, wanted: str) -> ModuleNotFoundError:
    """What to raise where an import failed: `MissingExtraError` if an extra brings the library, else the error itself.

    Args:
        error: of the import.
        wanted: what was asked for, for the message.
    """
    library = (error.name or "").split(".")[0]
    if isinstance(error, MissingExtraError) or library not in EXTRAS:
        return error
    command = f'pip install "dina-reward[{EXTRAS[library]}]"'
    return MissingExtraError(f"{wanted} needs {library}, which is not installed: {command}", name=error.name)


def lazy_exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package, whose names are listed once, for type checkers too.

    The names are those that the package's ``__init__`` imports under ``if TYPE_CHECKING:``, by their full module names.

    Args:
        package: the package's ``__name__``.

    Getting a name raises `MissingExtraError` where a library of an extra is missing.

    Raises:
        ValueError: a name is that of a sub-module, which would take its place once it is imported.
    """
    origins = _imports_for_type_checking(Path(str(sys.modules[package].__file__)))
    own = {module.removeprefix(f"{package}.").split(".")[0] for module in origins.values()}
    if clashes := origins.keys() & own:
        raise ValueError(f"{package} exports names of its own sub-modules: {sorted(clashes)}; import them eagerly")

    def get(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(origins[name]), name)
        except ModuleNotFoundError as error:
            raise missing_extra(error, f"{package}.{name}") from error
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *origins})

    return get, names, sorted(origins)


def _imports_for_type_checking(path: Path) -> dict[str, str]:
    """Modules by the names that are imported from them."""
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    blocks = [node for node in statements if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}
