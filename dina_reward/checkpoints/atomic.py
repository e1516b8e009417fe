"""Directories and files that appear whole or not at all, whatever moment the process is killed at.

A directory is written under a hidden name beside its target, flushed to the disk and then renamed. Several files of a
directory that others use too are written into a hidden folder in it, which is renamed before they are moved out of it.
What is named so can outlive a killed process; `clean_leftovers` and the next writer put it in order, and readers ask
`settled`, which finds the one complete version:

| name | what it is | what happens to it |
|---|---|---|
| ``.NAME.incomplete`` | a directory that was being written | deleted |
| ``.NAME.previous`` | the old directory, between the two renames of a replacement | renamed back if ``NAME`` is missing |
| ``.NAME.removing`` | a directory that was being deleted | deleted |
| ``.files.incomplete`` | files that were being written | deleted |
| ``.files.ready`` | complete files on their way into the directory around them | moved there |

Only what this package wrote is replaced: a directory of others, or one with a file that its replacement lacks, is refused.
Files get the permissions that the umask gives, which libraries narrow. One process at a time may write or remove one path.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path


_READY = ".files.ready"
_UNREADY = ".files.incomplete"


def incomplete_name(path: Path) -> Path:
    """Where a directory is written before it is renamed to ``path``."""
    return path.with_name(f".{path.name}.incomplete")


def previous_name(path: Path) -> Path:
    """Where the old directory is while the new one is renamed to ``path``."""
    return path.with_name(f".{path.name}.previous")


def settled(path: str | os.PathLike[str]) -> Path:
    """Where the complete file or directory of this name is, also after its writer was killed; nothing is changed."""
    path = Path(path)
    ready = path.parent / _READY / path.name
    if path.name and ready.exists():
        return ready
    if path.name and not path.exists() and previous_name(path).is_dir():
        return previous_name(path)
    return path


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, marker: str | None = None) -> Iterator[Path]:
    """Writes a directory so that ``path`` is always absent, the old directory, or the complete new one.

    The new directory replaces the old one as a whole. A path that is a link stays one. If the body raises, the old
    directory stays as it was.

    Examples:
        >>> with atomic_directory("my_reward") as directory:
        ...     reward.save_pretrained(directory)

    Args:
        path: directory to create or to replace.
        marker: name of a file without which a directory that is not empty belongs to others.

    Yields:
        `Path` of the empty directory to write into.

    Raises:
        ValueError: ``path`` is a file, the working directory or a mount point; or a directory of others: it lacks the
            marker, or holds a name that the new one has not.
    """
    target = Path(os.path.realpath(path))
    _refuse_foreign(target, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(target.parent, target.name)
    staging = incomplete_name(target)
    staging.mkdir()
    try:
        yield staging
        _refuse_losses(target, {entry.name for entry in staging.iterdir()})
        replace_directory(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_files(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes files into a directory that may hold others: for readers that ask `settled`, all are the old or all the new.

    Yields:
        `Path` of the empty folder to write the files into.
    """
    target = Path(os.path.realpath(directory))
    target.mkdir(parents=True, exist_ok=True)
    _move_ready_files(target)
    staging = target / _UNREADY
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        finish_tree(staging)
        os.rename(staging, target / _READY)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _move_ready_files(target)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file so that ``path`` is always absent, the old file, or the complete new one.

    The file is written under the name ``.NAME.incomplete`` beside its target, flushed to the disk and renamed. What a
    killed process leaves under that name is overwritten by the next one that writes ``path``.

    Yields:
        `Path` to write to.
    """
    target = Path(os.path.realpath(path))
    staging = incomplete_name(target)
    try:
        yield staging
        _widen(staging, _permissions(target.parent, target.name))
        _fsync(staging)
        os.replace(staging, target)
        _fsync(target.parent)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def replace_directory(source: Path, target: Path) -> None:
    """Flushes ``source`` to the disk and renames it to ``target``, on the same file system; the old target is deleted."""
    finish_tree(source)
    previous = previous_name(target)
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


def clean_leftovers(parent: Path, name: str | None = None, *, prefix: str = "") -> None:
    """Restores or deletes what a killed process left in ``parent``: for one name, or for all that begin with ``prefix``."""
    for leftover in sorted(parent.iterdir()):
        stem, dot, suffix = leftover.name.removeprefix(".").rpartition(".")
        known = dot and leftover.name.startswith(".") and suffix in ("incomplete", "removing", "previous")
        if not known or (stem != name if name is not None else not stem.startswith(prefix)):
            continue
        if suffix != "previous" or (parent / stem).exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            # Another node that shares this file system may have renamed it back first.
            with contextlib.suppress(FileNotFoundError):
                os.rename(leftover, parent / stem)


def finish_tree(root: Path) -> None:
    """Gives every file below ``root`` the usual permissions and flushes it, then the directories themselves."""
    permissions = _permissions(root)
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            _widen(Path(directory, name), permissions)
            _fsync(Path(directory, name))
        _fsync(Path(directory))


def _refuse_foreign(target: Path, marker: str | None) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; choose another directory to write to")
    if target in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(target):
        raise ValueError(f"{target} cannot be replaced while it is in use or a mount point; name a new folder in it")
    names = sorted(entry.name for entry in target.iterdir())
    if marker is not None and names and marker not in names:
        raise ValueError(
            f"{target} holds files of others ({', '.join(names[:5])}) and no {marker}, so it is not replaced; choose a new "
            "directory"
        )


def _refuse_losses(target: Path, replaced: set[str]) -> None:
    lost = sorted({entry.name for entry in target.iterdir()} - replaced) if target.is_dir() else []
    if lost:
        raise ValueError(
            f"{target} would be replaced as a whole, but holds other files too ({', '.join(lost[:5])}); choose a new "
            "directory, or move them away"
        )


def _move_ready_files(directory: Path) -> None:
    ready = directory / _READY
    if not ready.is_dir():
        return
    for file in sorted(ready.iterdir()):
        os.replace(file, directory / file.name)
    _fsync(directory)
    ready.rmdir()


def _permissions(directory: Path, name: str = "") -> int:
    """Permissions of a file that is made here now; asking for the umask would change it for other threads."""
    probe = directory / f".{name}.permissions"
    descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


def _widen(path: Path, permissions: int) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode | permissions != mode:
        path.chmod(mode | permissions)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
