"""Every block of Python in the documentation runs, page by page from top to bottom, and prints what it is said to print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import PAGES, ROOT, Block, blocks
from tests.docs.world import shorten_training, substituted


TESTED_ELSEWHERE = {"dina_reward/families/README.md": "tests/families/test_guide.py"}
PYTHON_PAGES = [
    page
    for page in PAGES
    if any(block.language == "python" for block in blocks(page))
    and str(page.relative_to(ROOT)) not in TESTED_ELSEWHERE
]
TOLERANCE = 0.02
_NUMBER = re.compile(r"-?\d+\.\d*")


def run_page(page: Path) -> list[tuple[Block, str, str]]:
    """Runs a page's blocks in one namespace; for each that a block of text follows: the block, what it prints, the text."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    compared, printed, last = [], "", None
    for block in blocks(page):
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(substituted(block.text), str(page), "exec"), namespace)
            printed, last = output.getvalue(), block
        elif block.language == "text" and last is not None:
            compared.append((last, printed, block.text))
            last = None
    return compared


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shorten_training(monkeypatch)
    for block, printed, documented in run_page(page):
        hint = f"{page} documents other output. It prints:\n{printed}\nfor:\n{block.text}"
        assert _NUMBER.sub("#", printed).split() == _NUMBER.sub("#", documented).split(), hint
        numbers = [[float(number) for number in _NUMBER.findall(output)] for output in (printed, documented)]
        assert numbers[0] == pytest.approx(numbers[1], abs=TOLERANCE), hint


def test_the_readme_runs_without_weights_first() -> None:
    first = next(block for block in blocks(ROOT / "README.md") if block.language == "python")
    assert substituted(first.text) == first.text
    assert len([line for line in first.text.splitlines() if line and "import" not in line]) == 6


def test_other_numbers_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint([0.5, 1.25])\n```\n\n```text\n[0.5, 1.35]\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"It prints:\s+\[0\.5, 1\.25\]"):
        test_page_runs(page, tmp_path, monkeypatch)


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_bytes()) < 7000
