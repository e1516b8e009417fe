from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dina_reward.data import json_rows
from dina_reward.data.json_rows import read_json_rows


def plain(table: pa.Table) -> list[dict[str, Any]]:
    """Rows with JSON columns decoded."""
    rows = table.to_pylist()
    for field in table.schema:
        if field.type == pa.json_():
            for row in rows:
                row[field.name] = None if row[field.name] is None else json.loads(row[field.name])
    return rows


values = st.one_of(
    st.none(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.booleans()
)
values = st.one_of(values, st.text(st.characters(exclude_categories=["Cs"]), max_size=6), st.lists(st.integers(0, 9)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({}, optional={"a": values, "b": values}), min_size=1, max_size=12).filter(any),
    st.booleans(),
)
def test_whatever_json_holds_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], as_lines: bool
) -> None:
    path = tmp_path_factory.mktemp("json") / "rows.json"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if as_lines else json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "BATCH_ROWS", 3)
        patch.setattr(json_rows, "BLOCK", 7)
        table, damaged = read_json_rows(path)
    assert not damaged
    names = {name for row in rows for name in row}
    words = {"null"}
    for read, row in zip(plain(table), rows, strict=True):
        for name in names:
            expected = row.get(name)
            if isinstance(expected, str) and expected in words:
                assert read[name] in (expected, None)
            elif isinstance(expected, bool) or not isinstance(expected, (int, float)):
                assert read[name] == expected
            else:
                assert read[name] == pytest.approx(expected)


def test_null_words_do_not_change_the_type_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"confidence": value} for value in (0.5, "null", None)]))
    table, _ = read_json_rows(path)
    assert table.schema.field("confidence").type == pa.float64()
    assert table["confidence"].to_pylist() == [0.5, None, None]


def test_records_that_are_no_objects_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, null, {"a": 2}, ["x"]]')
    table, damaged = read_json_rows(path)
    assert table.to_pylist() == [{"a": 1}, {"a": None}, {"a": 2}, {"a": None}]
    assert damaged == {1: "the record is no object but NoneType", 3: "the record is no object but list"}


def test_damaged_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"a": "x\u2028y"}\n\n{"a": \n{"a": "z"}\r\n', encoding="utf-8")
    table, damaged = read_json_rows(path)
    assert table.to_pylist() == [{"a": "x\u2028y"}, {"a": None}, {"a": "z"}]
    assert list(damaged) == [1]
    assert damaged[1].startswith("the line is no JSON: Expecting value")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no records"),
        (" [ ] ", "holds no records"),
        ('[{"a": 1}', "no valid JSON: the list does not end"),
        ('[{"a": 1} {"a": 2}]', "no valid JSON: unexpected '{' between items"),
        ('[{"a": 1}, {"a": tru', "no valid JSON: Expecting value"),
        ("[{}, 5]", "holds no records"),
        ("a,b\n1,2\n", "neither a JSON list nor JSON lines"),
    ],
)
def test_other_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"rows.json.*{message}"):
        read_json_rows(path)


@pytest.mark.parametrize("form", ["[{}, {}, {}]", "{}\n{}\n{}\n"])
def test_records_that_are_no_text_are_damaged_and_the_others_are_read(tmp_path: Path, form: str) -> None:
    path = tmp_path / "rows.json"
    rows = [b'{"prompt": "caf\xc3\xa9"}', b'{"prompt": "caf\xe9"}', b'{"prompt": "half \\ud83d"}']
    path.write_bytes(form.encode().replace(b"{}", b"%s") % tuple(rows))
    table, damaged = read_json_rows(path)
    assert table.column("prompt").to_pylist() == ["café", None, None]
    assert {index: "half of a character" in reason for index, reason in damaged.items()} == {1: True, 2: True}


def test_utf_16_is_read_by_its_bom(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "café"}\n'.encode("utf-16"))
    table, damaged = read_json_rows(path)
    assert table.column("prompt").to_pylist() == ["café"]
    assert damaged == {}


def test_deep_nesting_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' + "[" * 100_000 + "\n")
    assert list(read_json_rows(path)[1]) == [1]
    path.write_text("[" + "[" * 100_000)
    with pytest.raises(ValueError, match="rows.jsonl is no valid JSON"):
        read_json_rows(path)
