"""The scripts of this directory find what they import."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py")))
def test_a_script_can_be_imported(name: str) -> None:
    assert callable(importlib.import_module(f"tests.benchmarks.{name}").main)
