"""Names of what ships with the package."""

from __future__ import annotations

from pathlib import Path

from dina_reward.console import pipeline_path, reward_path


def test_shipped_names_are_directories_and_other_names_stay() -> None:
    for name in ("shapes", "shapes-ddpm"):
        assert Path(pipeline_path(name), "model_index.json").is_file()
        assert Path(reward_path(name), "head.safetensors").is_file()
    assert pipeline_path("shapes") != pipeline_path("shapes-ddpm")
    assert (pipeline_path("org/model"), reward_path("org/reward")) == ("org/model", "org/reward")
