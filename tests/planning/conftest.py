"""A generator that is planned in a second: the tiny Stable Diffusion 3 of the tests, on disk without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward.backbones.structures import ModelStructure, structure_of_repository
from dina_reward.planning.sizes import RunSizes, sizes_of
from tests.alignment.helpers import tiny_config
from tests.tiny_models import tiny_sd3_pipeline


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of `tests.alignment.helpers`."""
    directory = tmp_path_factory.mktemp("planned") / "tiny"
    tiny_sd3_pipeline(num_layers=2, dual_attention_layers=()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def structure(saved: Path) -> ModelStructure:
    return structure_of_repository(saved)


@pytest.fixture(scope="session")
def config() -> Any:
    return tiny_config("out", max_sequence_length=None)


@pytest.fixture(scope="session")
def sizes(structure: ModelStructure, config: Any) -> RunSizes:
    return sizes_of(structure, config, torch.float32)
