"""Notes of libraries that our commands leave out, and loading bars that come back."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import diffusers.utils.logging as diffusers_logging
import pytest
import torch
import transformers.utils.logging as transformers_logging

from dina_reward.quiet import dtype_option, hide_library_notes, no_loading_bars


LIBRARIES = [diffusers_logging, transformers_logging]


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    imports = logging.getLogger("transformers.utils.import_utils")
    filters = list(imports.filters)
    yield
    imports.filters[:] = filters


def test_two_notes_are_hidden_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    hide_library_notes()
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.warning("Failed to load CPU gemm_4bit_forward")
    kernels.error("broken")
    imports = logging.getLogger("transformers.utils.import_utils")
    imports.propagate = True
    imports.warning("`XImageProcessor` requires torchvision (not installed); falling back to `XImageProcessorPil`")
    imports.warning("`X` requires sentencepiece")
    assert [record.message for record in caplog.records] == ["broken", "`X` requires sentencepiece"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["-m", "dina_reward.shapes.evaluation", "--count", "1", "--steps", "1"], ["recipes/ablate_reward.py", "-h"]],
)
def test_modules_and_comparisons_print_no_notes(command: list[str]) -> None:
    run = subprocess.run([sys.executable, *command], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(("version", "name"), [("0.36.0", "torch_dtype"), ("0.42.1", "dtype"), ("1.0.0", "dtype")])
def test_the_keyword_for_dtypes_is_the_one_that_diffusers_knows(
    monkeypatch: pytest.MonkeyPatch, version: str, name: str
) -> None:
    monkeypatch.setattr("diffusers.__version__", version)
    assert dtype_option(torch.bfloat16) == {name: torch.bfloat16}


@pytest.mark.parametrize("enabled", [True, False])
def test_bars_are_as_before_afterwards(enabled: bool) -> None:
    before = [library.is_progress_bar_enabled() for library in LIBRARIES]
    try:
        for library in LIBRARIES:
            (library.enable_progress_bar if enabled else library.disable_progress_bar)()
        with no_loading_bars():
            assert [library.is_progress_bar_enabled() for library in LIBRARIES] == [False, False]
        assert [library.is_progress_bar_enabled() for library in LIBRARIES] == [enabled, enabled]
    finally:
        for library, value in zip(LIBRARIES, before, strict=True):
            (library.enable_progress_bar if value else library.disable_progress_bar)()
