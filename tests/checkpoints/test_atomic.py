from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from dina_reward.checkpoints import atomic
from dina_reward.checkpoints.atomic import atomic_directory, atomic_file, atomic_files, clean_leftovers, settled


def write(directory: Path, text: str) -> None:
    (directory / "file.txt").write_text(text)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_writes_a_new_directory(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "nested" / "out") as directory:
        write(directory, "new")
        assert not (tmp_path / "nested" / "out").exists()
    assert (tmp_path / "nested" / "out" / "file.txt").read_text() == "new"
    assert names(tmp_path / "nested") == ["out"]


def test_replaces_what_it_wrote(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_directory(tmp_path / "out", marker="file.txt") as directory:
            write(directory, text)
        assert (tmp_path / "out" / "file.txt").read_text() == text
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("marker", [None, "file.txt"])
@pytest.mark.parametrize("theirs", [["thesis.tex"], ["file.txt", "thesis.tex"], ["file.txt", ".git"]])
def test_directories_of_others_are_not_touched(tmp_path: Path, theirs: list[str], marker: str | None) -> None:
    (tmp_path / "out").mkdir()
    for name in theirs:
        (tmp_path / "out" / name).write_text("precious")
    with (
        pytest.raises(ValueError, match=r"choose a new directory"),
        atomic_directory(tmp_path / "out", marker=marker) as directory,
    ):
        write(directory, "new")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == dict.fromkeys(theirs, "precious")
    assert names(tmp_path) == ["out"]


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for path in (".", ".."):
        with pytest.raises(ValueError, match="in use"), atomic_directory(path):
            pass


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "large" / "disk").mkdir(parents=True)
    (tmp_path / "outputs").symlink_to(tmp_path / "large" / "disk")
    for text in ("first", "second", "third"):
        with atomic_directory(tmp_path / "outputs", marker="file.txt") as directory:
            write(directory, text)
        assert (tmp_path / "outputs").is_symlink()
        assert (tmp_path / "large" / "disk" / "file.txt").read_text() == text
    assert names(tmp_path) == ["large", "outputs"]
    assert names(tmp_path / "large") == ["disk"]


@pytest.mark.parametrize("name", ["run[1]", "a*b", "a?"])
def test_names_are_no_patterns(tmp_path: Path, name: str) -> None:
    for leftover in (f".{name}.incomplete", ".ab.incomplete", ".run1.incomplete"):
        (tmp_path / leftover).mkdir()
    with atomic_directory(tmp_path / name) as directory:
        write(directory, "new")
    assert names(tmp_path) == sorted([name, ".ab.incomplete", ".run1.incomplete"])


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_get_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    def write_narrow(directory: Path) -> None:
        (directory / "file").touch(mode=0o600)

    before = os.umask(umask)
    try:
        with atomic_directory(tmp_path / "directory") as directory:
            write_narrow(directory)
        with atomic_files(tmp_path) as directory:
            write_narrow(directory)
        with atomic_file(tmp_path / "single") as staging:
            staging.touch(mode=0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "directory" / "file", tmp_path / "file", tmp_path / "single"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert names(tmp_path) == ["directory", "file", "single"]


def test_several_files_are_all_old_or_all_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_all(text: str) -> None:
        with atomic_files(tmp_path) as staging:
            for name in "abc":
                (staging / name).write_text(text)

    def seen() -> set[str]:
        return {settled(tmp_path / name).read_text() for name in "abc"}

    (tmp_path / "theirs").write_text("kept")
    replace = os.replace
    for killed_at in range(4):
        write_all("old")
        calls = iter(range(10))

        def dies(*paths: Any, killed_at: int = killed_at, calls: Any = calls) -> None:
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            replace(*paths)

        monkeypatch.setattr(atomic.os, "replace", dies)
        with pytest.raises(KeyboardInterrupt) if killed_at < 3 else contextlib.nullcontext():
            write_all(f"new {killed_at}")
        assert seen() == {f"new {killed_at}"}
        monkeypatch.setattr(atomic.os, "replace", replace)
    write_all("last")
    assert seen() == {"last"}
    assert names(tmp_path) == ["a", "b", "c", "theirs"]


def test_readers_find_the_old_directory_between_the_renames(tmp_path: Path) -> None:
    (tmp_path / ".out.previous").mkdir()
    assert settled(tmp_path / "out") == tmp_path / ".out.previous"
    (tmp_path / "out").mkdir()
    assert settled(tmp_path / "out") == tmp_path / "out"
    assert settled(".") == Path()


def test_error_keeps_the_old_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")

    def write_half() -> None:
        with atomic_directory(tmp_path / "out") as directory:
            write(directory, "new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert (tmp_path / "out" / "file.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_kill_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    (tmp_path / ".out.previous").mkdir()
    write(tmp_path / ".out.previous", "old")
    clean_leftovers(tmp_path)
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file.txt").read_text() == "old"


def test_failed_rename_brings_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")
    rename = os.rename

    def fail_for_new(source: Path, target: Path) -> None:
        if source.name.endswith(".incomplete"):
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", fail_for_new)
    with pytest.raises(OSError, match="no space"), atomic_directory(tmp_path / "out") as directory:
        write(directory, "new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file.txt").read_text() == "old"


def test_leftovers_of_a_killed_process_do_not_disturb(tmp_path: Path) -> None:
    for name in (".out.incomplete", ".out.removing", ".out.previous"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, name)
    with atomic_directory(tmp_path / "out") as directory:
        write(directory, "new")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file.txt").read_text() == "new"


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="is a file"), atomic_directory(tmp_path / "out"):
        pass


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "file"
    (tmp_path / ".file.incomplete").write_text("left by a killed process")
    with atomic_file(target) as staging:
        staging.write_text("first")
        assert not target.exists()
    with pytest.raises(UnicodeEncodeError), atomic_file(target) as staging:
        staging.write_text("half\udc80", encoding="utf-8")
    assert target.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
