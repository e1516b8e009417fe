"""Directories and files that appear whole or not at all, whatever moment the process is killed at.

A directory is written under a hidden name beside its target, flushed to the disk and then renamed. Three hidden names can
outlive a killed process; `clean_leftovers` puts them in order:

| name | what it is | what happens to it |
|---|---|---|
| ``.NAME.incomplete`` | a directory that was being written | deleted |
| ``.NAME.previous`` | the old directory, between the two renames of a replacement | renamed back if ``NAME`` is missing |
| ``.NAME.removing`` | a directory that was being deleted | deleted |

One process at a time may write or remove one path.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def incomplete_name(path: Path) -> Path:
    """Where a directory is written before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.incomplete")


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a directory so that ``path`` is always absent, the old directory, or the complete new one.

    The new directory replaces the old one as a whole: files that only the old one had are gone. If the body raises, the
    old directory stays as it was.

    Examples:
        >>> with atomic_directory("my_reward") as directory:
        ...     reward.save_pretrained(directory)

    Args:
        path: directory to create or to replace.

    Yields:
        `Path` of the empty directory to write into.

    Raises:
        ValueError: ``path`` exists and is a file.
    """
    target = Path(os.path.abspath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; choose another directory to write to")
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target.parent, target.name)
    staging = incomplete_name(target)
    staging.mkdir()
    try:
        yield staging
        replace_directory(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file so that ``path`` is always absent, the old file, or the complete new one.

    The file is written under the name ``.NAME.incomplete`` beside its target, flushed to the disk and renamed. What a
    killed process leaves under that name is overwritten by the next one that writes ``path``.

    Yields:
        `Path` to write to.
    """
    target = Path(os.path.abspath(path))
    staging = incomplete_name(target)
    try:
        yield staging
        _fsync(staging)
        os.replace(staging, target)
        _fsync(target.parent)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def replace_directory(source: Path, target: Path) -> None:
    """Flushes ``source`` to the disk and renames it to ``target``, on the same file system; the old target is deleted."""
    fsync_tree(source)
    previous = target.with_name(f".{target.name}.previous")
    if target.exists():
        os.rename(target, previous)
    try:
        os.rename(source, target)
    except BaseException:
        if previous.exists():
            os.rename(previous, target)
        raise
    _fsync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Deletes a directory; a kill on the way leaves nothing under its name."""
    removing = path.with_name(f".{path.name}.removing")
    os.rename(path, removing)
    shutil.rmtree(removing, ignore_errors=True)


def clean_leftovers(parent: Path, pattern: str = "*") -> None:
    """Restores or deletes what a killed process left in ``parent`` for names that match ``pattern`` (a glob)."""
    for suffix in ("incomplete", "removing"):
        for leftover in parent.glob(f".{pattern}.{suffix}"):
            shutil.rmtree(leftover, ignore_errors=True)
    for previous in parent.glob(f".{pattern}.previous"):
        target = previous.with_name(previous.name.removeprefix(".").removesuffix(".previous"))
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            # Another node that shares this file system may have renamed it back first.
            with contextlib.suppress(FileNotFoundError):
                os.rename(previous, target)


def fsync_tree(root: Path) -> None:
    """Flushes every file below ``root``, then the directories themselves."""
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            _fsync(Path(directory, name))
        _fsync(Path(directory))


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
