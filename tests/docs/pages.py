"""What stands in the documentation for people to copy: blocks of Python, what they print, and command lines."""

from __future__ import annotations

import ast
import doctest
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "recipes" / "README.md",
    ROOT / "dina_reward" / "families" / "README.md",
    ROOT / "dina_reward" / "integrations" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
SOURCES = tuple(
    path for folder in ("dina_reward", "recipes", "examples") for path in sorted((ROOT / folder).rglob("*.py"))
)

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_PROGRAMS = ("accelerate", "dina-reward", "jupyter", "mkdocs", "python")
_COMMAND = re.compile(rf"^(?:{'|'.join(_PROGRAMS)}) [^`]*$")
_EXAMPLE = re.compile(r"^Examples?:\n((?:    .*\n|\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        language: the word after the fence.
        text: what stands between the fences, without the indentation of the block.
    """

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = _FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Block(match[2], re.sub(rf"^{match[1]}", "", match[3], flags=re.MULTILINE)) for match in found]


def commands(page: Path) -> list[str]:
    """Command lines of a page: those of its shell blocks, and what stands in backticks and begins with a program."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in _lines(block.text)]
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
    # `dina-reward eval` in a sentence is the name of a command, not a line to copy.
    return [*lines, *(span for span in spans if _COMMAND.match(span) and "..." not in span and span.count(" ") > 1)]


def docstring_commands(source: Path) -> list[str]:
    """Command lines in the docstring of a module."""
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    indented = "".join(line[4:] + "\n" for line in text.splitlines() if line.startswith("    "))
    return [line for line in _lines(indented) if _COMMAND.match(line)]


def docstring_examples(source: Path) -> Iterator[tuple[str, list[doctest.Example]]]:
    """Names of a module's objects and the examples in their docstrings."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            examples = doctest.DocTestParser().get_examples(text + "\n")
            plain = _EXAMPLE.search(text + "\n")
            if not examples and plain is not None:
                code = re.sub(r"^    ", "", plain[1], flags=re.MULTILINE)
                examples = [doctest.Example(ast.unparse(statement) + "\n", "") for statement in ast.parse(code).body]
            if examples:
                yield getattr(node, "name", source.stem), examples


def _lines(text: str) -> list[str]:
    """Commands of a shell script: continued lines joined, comments left out, ``&&`` taken apart."""
    joined = re.sub(r"\\\\?\n\s*", "", text)
    found = []
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        found += [part.strip() for part in shlex.join(words).replace("'&&'", "&&").split("&&") if part.strip()]
    return found
