"""Names of what ships with the package."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dina_reward.cli.console import in_terminal
from dina_reward.shipped import pipeline_path, reward_path


def test_shipped_names_are_directories_and_other_names_stay() -> None:
    for name in ("shapes", "shapes-ddpm"):
        assert Path(pipeline_path(name), "model_index.json").is_file()
        assert Path(reward_path(name), "head.safetensors").is_file()
    assert pipeline_path("shapes") != pipeline_path("shapes-ddpm")
    assert (pipeline_path("org/model"), reward_path("org/reward")) == ("org/model", "org/reward")


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_drawn_in_terminals(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal))
    assert in_terminal() is terminal
