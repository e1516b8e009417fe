"""No function is longer than a screen: its signature and statements, without decorators and docstring, fit on 60 lines."""

from __future__ import annotations

import ast
from pathlib import Path

import dina_reward


MAX_LINES = 60


def function_lengths(source: str) -> dict[str, int]:
    """Lines of each function from ``def`` to its last statement, those of its docstring left out."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            docstring = (node.body[0].end_lineno or 0) - node.body[0].lineno + 1 if documented else 0
            lengths[node.name] = (node.end_lineno or 0) - node.lineno + 1 - docstring
    return lengths


def test_lengths_are_counted_without_docstrings() -> None:
    source = 'def f(\n    x,\n):\n    """One.\n\n    Two.\n    """\n    return x\n\n\ndef g(): return 1\n'
    assert function_lengths(source) == {"f": 4, "g": 1}


def test_functions_fit_on_a_screen() -> None:
    too_long = {
        f"{path.name}: {name}": lines
        for path in Path(dina_reward.__file__).parent.rglob("*.py")
        for name, lines in function_lengths(path.read_text(encoding="utf-8")).items()
        if lines > MAX_LINES
    }
    assert too_long == {}
