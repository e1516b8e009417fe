from __future__ import annotations

import os
from pathlib import Path

import pytest

from dina_reward.checkpoints import atomic
from dina_reward.checkpoints.atomic import atomic_directory, atomic_file, clean_leftovers


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


def test_replaces_a_directory_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    with atomic_directory(tmp_path / "out") as directory:
        write(directory, "new")
    assert names(tmp_path / "out") == ["file.txt"]
    assert names(tmp_path) == ["out"]


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
