"""Keeps the noise of libraries out of what commands and recipes print."""

from __future__ import annotations

import logging


def hide_notes_of_optional_kernels() -> None:
    """Keeps a note of bitsandbytes out of what commands print; has to come before it is imported.

    On CPUs with certain instructions it recommends a package for 4-bit kernels, whatever the command is about.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
