"""The page on scale shows what its commands print."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dina_reward.backbones.structures import ModelStructure
from dina_reward.cli.app import app
from tests.docs.pages import ROOT


PAGE = ROOT / "docs" / "guides" / "scale.md"


def shown(page: Path) -> dict[str, str]:
    """Commands of a page that a block of text follows, and that text."""
    pattern = r"```bash\n(dina-reward [^\n]*)\n```\n\n```text\n(.*?)```"
    return dict(re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL))


def printed(command: str) -> str:
    """What a command line of ours prints."""
    result = CliRunner().invoke(app, shlex.split(command)[1:], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.slow
def test_the_page_shows_what_its_commands_print(monkeypatch: pytest.MonkeyPatch) -> None:
    from dina_reward.planning import sizes

    # The parts of the generator are counted once for all commands.
    kept: dict[str, sizes.RunSizes] = {}
    count = sizes.sizes_of

    def once(structure: ModelStructure, *settings: Any) -> sizes.RunSizes:
        if structure.name not in kept:
            kept[structure.name] = count(structure, *settings)
        return kept[structure.name]

    monkeypatch.setattr(sizes, "sizes_of", once)
    monkeypatch.chdir(ROOT)
    commands = shown(PAGE)
    assert len(commands) == 4
    for command, text in commands.items():
        assert printed(command).splitlines() == text.splitlines(), command
