"""Keeps the noise of libraries out of what our own calls and commands print; what the user's calls print stays."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any


_DTYPE_SINCE = "0.42.1"
_TEXT_DTYPE_SINCE = "4.56"
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_BITSANDBYTES = "bitsandbytes.backends.cpu.ops"
_TRANSFORMERS_IMPORTS = "transformers.utils.import_utils"


def dtype_option(dtype: Any) -> dict[str, Any]:
    """The keyword of diffusers' ``from_pretrained``: ``dtype``, or ``torch_dtype`` in versions that do not know it yet."""
    import diffusers
    from packaging.version import Version

    return {"dtype" if Version(diffusers.__version__) >= Version(_DTYPE_SINCE) else "torch_dtype": dtype}


def text_dtype_option(dtype: Any) -> dict[str, Any]:
    """The same keyword of transformers' ``from_pretrained``."""
    import transformers
    from packaging.version import Version

    return {"dtype" if Version(transformers.__version__) >= Version(_TEXT_DTYPE_SINCE) else "torch_dtype": dtype}


def use_new_names(args: Any) -> None:
    """Moves fields of `transformers.TrainingArguments` to the names that its later versions give them without a warning.

    To be called before its ``__post_init__``, which makes the old names mirror the new ones again.
    """
    for old, new in _RENAMED.items():
        if getattr(args, new, False) is None and getattr(args, old) is not None:
            setattr(args, new, getattr(args, old))


def hide_library_notes() -> None:
    """Keeps two notes out of what commands and recipes print; has to come before the libraries are imported.

    On CPUs with certain instructions bitsandbytes recommends a package for 4-bit kernels, and without torchvision
    transformers says for every class that its slower image processor is used, whatever the command is about.
    """
    logging.getLogger(_BITSANDBYTES).setLevel(logging.ERROR)
    logging.getLogger(_TRANSFORMERS_IMPORTS).addFilter(_is_no_note_on_torchvision)


@contextlib.contextmanager
def no_loading_bars() -> Iterator[None]:
    """Context in which diffusers and transformers draw no bars; after it they do what they did before."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = [diffusers.utils.logging, transformers.utils.logging]
    drawn = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in drawn:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in drawn:
            library.enable_progress_bar()


def _is_no_note_on_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision (not installed)" not in str(record.msg)
