"""Results that are kept: whole ones of the same settings and content, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from dina_reward.checkpoints.kept_results import identity, read_result, write_result


def test_a_result_is_kept_for_the_same_settings_and_content(tmp_path: Path) -> None:
    config, path = tmp_path / "a.yaml", tmp_path / "run" / "result.json"
    config.write_text("steps: 1")
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "head").write_bytes(b"1")

    def wanted(**settings: object) -> dict[str, object]:
        return identity({"seed": 0, "calls": (1, 2), **settings}, config, tmp_path / "reward", "no/such")

    write_result(path, wanted(), {"accuracy": 0.7})
    result = read_result(path, wanted())
    assert result is not None
    assert result["accuracy"] == 0.7
    assert read_result(path, wanted(seed=1)) is None
    assert read_result(path, wanted(more=1)) is None
    for file, content in ((config, "steps: 2"), (tmp_path / "reward" / "head", "2")):
        before = file.read_text()
        file.write_text(content)
        assert read_result(path, wanted()) is None
        file.write_text(before)
    assert read_result(path, wanted()) is not None


def test_a_result_is_kept_where_a_checkout_moves_and_names_no_place(tmp_path: Path) -> None:
    for place, text in (("here", "steps: 1"), ("there", "steps: 1"), ("other", "steps: 2")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.yaml").write_text(text)
    here, there, other = (identity({"seed": 0}, tmp_path / place / "a.yaml") for place in ("here", "there", "other"))
    write_result(tmp_path / "result.json", here, {})
    assert str(tmp_path) not in (tmp_path / "result.json").read_text()
    assert read_result(tmp_path / "result.json", there) is not None
    assert read_result(tmp_path / "result.json", other) is None


@pytest.mark.parametrize("text", ["", '{"history": [{"st', "[]", '{"settings": 3}', "[" * 10**6])
def test_a_damaged_result_is_made_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    assert read_result(tmp_path / "result.json", identity({})) is None
    assert read_result(tmp_path / "none.json", identity({})) is None


def test_results_of_earlier_versions_are_kept(tmp_path: Path) -> None:
    write_result(tmp_path / "result.json", {"seed": 0}, {})
    assert read_result(tmp_path / "result.json", identity({"seed": 0})) is not None
