"""A subject that is measured in seconds: the tiny Stable Diffusion 3 of the tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dina_reward.bench import Subject, loaded_subject, machine
from tests.tiny_models import tiny_sd3_pipeline


@pytest.fixture(scope="session")
def subject() -> Subject:
    return loaded_subject(tiny_sd3_pipeline(), "tiny", max_sequence_length=7)


@pytest.fixture(scope="session", autouse=True)
def _small_roofs() -> Iterator[None]:
    """Small matrices: the roofs need not be right here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "MATRIX_SIDE", {"cpu": 64})
        patch.setattr(machine, "COPY_BYTES", {"cpu": 2**16})
        yield
