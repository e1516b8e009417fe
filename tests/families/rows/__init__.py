"""Rows of the matrix: one module per family, each with a `ROW`."""

import importlib
import pkgutil

from tests.families.row import Row


ROWS: list[Row] = [
    importlib.import_module(f"{__name__}.{module.name}").ROW for module in pkgutil.iter_modules(__path__)
]
