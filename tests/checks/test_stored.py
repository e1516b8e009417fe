"""Files name themselves in errors; what they say of themselves is compared item by item."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dina_reward.checks.stored import check_same, content_digest, differences, parse_json, read_json, read_tensors


@pytest.mark.parametrize("text", ["{", "[" * 200_000, "1" * 10_000, "\ud83d"])
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match="settings.json is not valid JSON"):
        parse_json(text, "settings.json")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0")
    with pytest.raises(ValueError, match=r"cut\.safetensors is missing, truncated or no safetensors file"):
        read_tensors(tmp_path / "cut.safetensors")
    save_file({"x": torch.arange(3.0)}, tmp_path / "whole.safetensors")
    assert read_tensors(tmp_path / "whole.safetensors")["x"].tolist() == [0, 1, 2]


def test_differences_are_of_values_not_of_how_they_are_written() -> None:
    assert differences({"a": 1, "b": (1, 2), "c": {2, 1}}, {"a": 1.0, "b": [1, 2], "c": {1, 2}}) == []
    assert differences({"a": True}, {"a": 1}) == ["a: true there, 1 here"]
    assert differences({"a": 1, "old": 2}, {"a": 3, "new": 4}) == ["a: 1 there, 3 here"]
    assert differences({"a": 1}, {"a": 3}, may_differ=("a",)) == []
    both = differences({"a": 1, "old": 2}, {"a": 1, "new": 4}, both=True)
    assert both == ["old: 2 there, null here", "new: null there, 4 here"]


def test_every_difference_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^x is another; 2 of its settings differ \(a: 1 there, 2 here; b: .*\)\. Go$"
    ):
        check_same({"a": 1, "b": "u"}, {"a": 2, "b": "v"}, "x is another", "Go")
    check_same({"a": 1}, {"a": 1}, "x is another", "Go")


def test_a_digest_is_of_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = content_digest(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_digest(tmp_path / "b") == first
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    renamed = content_digest(tmp_path / "b")
    (tmp_path / "b" / "y").write_text("2")
    assert len({first, renamed, content_digest(tmp_path / "b")}) == 3
    assert content_digest(tmp_path / "absent") is None
