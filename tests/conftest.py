"""Fixtures shared by all tests: tiny models built in memory, and the golden reference checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

from tests.tiny_models import tiny_sd3_pipeline


torch.set_num_threads(1)

PARITY = Path(__file__).parent / "fixtures" / "parity" / "case_a"


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
