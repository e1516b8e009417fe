"""Fixtures shared by all tests: tiny models built in memory, and the golden reference checkpoint."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from hypothesis import settings

from tests.tiny_models import tiny_sd3_pipeline


torch.set_num_threads(1)
settings.register_profile("without deadline", deadline=None)  # a busy machine is no fault of the code, nor of a mutant
settings.load_profile("without deadline")

LONG_FILES = (
    "integration/test_kill_and_resume.py",
    "integration/test_recipes.py",
    "integration/test_examples.py",
    "integration/test_pixel_recipe.py",
    "integration/test_reward_hacking.py",
    "docs/test_tour.py",
    "distributed/test_algorithms.py",
    "families/test_matrix.py",
    "cli/test_eval.py",
    "cli/test_noise.py",
)
"""Longest first: what is started last must be short, or one core waits for the other."""
COMPILES, COMPILED = "test_backbone_compiles_whole[", ("stable_diffusion]", "sd3]", "flux]")
"""A UNet, a joint transformer and one with single blocks are compiled by default; the other families take as long again."""
PARITY = Path(__file__).parent / "fixtures" / "parity" / "case_a"


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all test files are imported, of whose time it takes a fifth
    # pytest-xdist would start with the files of most tests; what takes long has few.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    for item in items:
        if item.name.startswith(COMPILES) and not item.name.removeprefix(COMPILES).startswith(COMPILED):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    # Every start of a trainer collects garbage. Looking through the imported libraries took 40 % of a tiny run.
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    """Reference checkpoint with golden numbers; see README.md beside it."""
    return PARITY


@pytest.fixture(scope="session")
def parity_cases() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(PARITY / "cases.safetensors")


@pytest.fixture
def parity_transformer() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(PARITY / "base", subfolder="transformer")


@pytest.fixture(scope="session")
def parity_scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_pretrained(PARITY / "base", subfolder="scheduler")


@pytest.fixture(scope="session")
def sd3_pipeline() -> Any:
    """Tiny random `StableDiffusion3Pipeline`; treat it as read-only."""
    return tiny_sd3_pipeline()
