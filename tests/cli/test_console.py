"""Names of what ships with the package, and what commands do not print."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dina_reward.cli.console import pipeline_path, reward_path
from dina_reward.recipes.quiet import hide_notes_of_optional_kernels


def test_shipped_names_are_directories_and_other_names_stay() -> None:
    for name in ("shapes", "shapes-ddpm"):
        assert Path(pipeline_path(name), "model_index.json").is_file()
        assert Path(reward_path(name), "head.safetensors").is_file()
    assert pipeline_path("shapes") != pipeline_path("shapes-ddpm")
    assert (pipeline_path("org/model"), reward_path("org/reward")) == ("org/model", "org/reward")


def test_notes_of_optional_kernels_are_hidden_and_errors_are_not(caplog: pytest.LogCaptureFixture) -> None:
    hide_notes_of_optional_kernels()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward")
    logger.error("broken")
    assert [record.message for record in caplog.records] == ["broken"]
