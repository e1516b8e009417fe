from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dina_reward.data import read_preferences
from dina_reward.data.tables import open_table
from tests.data.preference_files import all_pairs, number, write_image, write_json, write_parquet


def rows(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "path1": "a", "path2": "b"} for prompt in prompts]


def prompts(source: Any, split: str = "train") -> list[str]:
    return list(open_table(source, split).dataset["prompt"])


def test_files(tmp_path: Path) -> None:
    assert prompts(write_json(tmp_path / "x.json", rows("p", "q"))) == ["p", "q"]
    (tmp_path / "x.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q"}')
    assert prompts(tmp_path / "x.jsonl") == ["p", "q"]
    assert prompts(str(write_parquet(tmp_path / "x.parquet", rows("p", "q")))) == ["p", "q"]
    (tmp_path / "x.csv").write_text("prompt,path1\np,1\nq,2\n")
    assert prompts(tmp_path / "x.csv") == ["p", "q"]
    (tmp_path / "x.txt").write_text("p")
    with pytest.raises(ValueError, match=r"suffix '.txt'; expected one of \['.parquet'"):
        open_table(tmp_path / "x.txt")


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", rows("train"))
    write_json(tmp_path / "hpdv3_test.json", rows("test"))
    (tmp_path / "data").mkdir()
    for shard in (0, 1):
        write_parquet(tmp_path / "data" / f"test_unique-{shard:05d}-of-00002.parquet", rows(f"unique {shard}"))
    (tmp_path / "validation").mkdir()
    write_parquet(tmp_path / "validation" / "part.parquet", rows("validation"))
    assert prompts(tmp_path) == ["train"]
    assert prompts(tmp_path, "test_unique") == ["unique 0", "unique 1"]
    assert prompts(tmp_path, "validation") == ["validation"]
    with pytest.raises(ValueError, match=r"files of several formats \['.json', '.parquet'\].* for the split 'test'"):
        open_table(tmp_path, "test")
    with pytest.raises(ValueError, match="no data file for the split 'holdout'; expected .*train.json"):
        open_table(tmp_path, "holdout")


def test_a_folder_without_split_names_is_one_split(tmp_path: Path) -> None:
    for part in "ab":
        write_json(tmp_path / f"part_{part}.json", rows(part))
    assert prompts(tmp_path) == ["a", "b"]
    write_json(tmp_path / "bench_test.json", rows("c"))
    with pytest.raises(ValueError, match="no data file for the split 'train'"):
        open_table(tmp_path)
    assert prompts(tmp_path, "test") == ["c"]


def test_damaged_records_count_from_the_first_file_on(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", rows("p", "q"))
    write_json(tmp_path / "b.json", [*rows("r"), "broken"])
    reader = read_preferences(tmp_path, max_broken=0.25)
    assert len(reader) == 3
    assert reader.report.first == [(3, "the record is no object but str")]
    with pytest.raises(ValueError, match="1 of 4 rows are broken"):
        read_preferences(tmp_path)


def test_datasets(tmp_path: Path) -> None:
    train, test = datasets.Dataset.from_list(rows("p")), datasets.Dataset.from_list(rows("q"))
    splits = datasets.DatasetDict({"train": train, "test": test})
    assert (prompts(train, "any"), prompts(splits), prompts(splits, "test")) == (["p"], ["p"], ["q"])
    splits.save_to_disk(str(tmp_path / "splits"))
    train.save_to_disk(str(tmp_path / "one"))
    assert (prompts(tmp_path / "splits", "test"), prompts(tmp_path / "one")) == (["q"], ["p"])
    with pytest.raises(ValueError, match=r"no split 'test_v1'; it has \['test', 'train'\]"):
        open_table(splits, "test_v1")
    with pytest.raises(ValueError, match=r"got list; datasets.Dataset.from_list turns"):
        open_table(rows("p"))


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(rows("hub"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    opened = open_table("owner/name", "test")
    assert (list(opened.dataset["prompt"]), opened.folder, asked) == (["hub"], None, [("owner/name", "test")])

    def refuse(name: str, split: str) -> datasets.Dataset:
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match="scripts are no longer supported.*hf download owner/name --repo-type dataset"
    ):
        open_table("owner/name")


def test_relative_paths_start_at_the_dataset(tmp_path: Path) -> None:
    reader = read_preferences(write_json(tmp_path / "train.json", rows("p")))
    assert reader.image_root == tmp_path
    assert read_preferences(tmp_path / "train.json", image_root="elsewhere").image_root == Path("elsewhere")


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_views_of_text_are_text(tmp_path: Path, suffix: str) -> None:
    """As polars and DuckDB write columns of text."""
    columns = {
        "prompt": ["a", "b"],
        "path1": [write_image(tmp_path / f"{number}.png", number) for number in (1, 2)],
        "path2": [write_image(tmp_path / f"{number}.png", number) for number in (3, 4)],
        "confidence": ["0.9", "null"],
    }
    table = pa.table({name: pa.array(values).cast(pa.string_view()) for name, values in columns.items()})
    file = tmp_path / f"views.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    views, plain = read_preferences(file), read_preferences(datasets.Dataset.from_dict(columns), image_root=tmp_path)
    assert [pair.prompt for pair in all_pairs(views)] == ["a", "b"]
    np.testing.assert_array_equal(views.labels.p_a, plain.labels.p_a)
    assert [views.names(index) for index in range(2)] == [plain.names(index) for index in range(2)]
    assert {number(side) for pair in all_pairs(views) for side in (pair.a, pair.b)} == {1, 2, 3, 4}
