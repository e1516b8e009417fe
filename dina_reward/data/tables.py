"""Opens whatever holds preferences: a file, a folder, a saved or loaded `datasets.Dataset`, or a dataset on the hub."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dina_reward.data.files import text_encoding
from dina_reward.data.json_rows import read_json_rows


if TYPE_CHECKING:
    import datasets

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".arrow")
INDEX_COLUMNS = ("parquet_path", "row_group", "row_index")


@dataclass(frozen=True)
class OpenedTable:
    """Rows of a dataset.

    Args:
        dataset: the rows; images are not decoded.
        folder: where relative paths start by default; None when the dataset is not on this disk.
        damaged: index and reason of records that could not be read at all.
        name: what was opened, for messages.
    """

    dataset: datasets.Dataset
    folder: Path | None
    name: str
    damaged: dict[int, str] = field(default_factory=dict)


def open_table(source: Any, split: str = "train") -> OpenedTable:
    """Opens a dataset.

    Args:
        source: a `datasets.Dataset` or `datasets.DatasetDict`; a parquet, json, jsonl, csv or arrow file; a folder of
            them or one written by ``save_to_disk``; or the hub id of a dataset.
        split: which split. In a folder: files in a folder of that name or whose names begin with it; where no file is
            named after any split, all files.

    Raises:
        ValueError: there is nothing readable, or no such split.
    """
    import datasets

    if isinstance(source, datasets.DatasetDict):
        return OpenedTable(_pick(source, split, "the DatasetDict"), None, "the DatasetDict")
    if isinstance(source, datasets.Dataset):
        return OpenedTable(source, None, "the dataset")
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"expected a datasets.Dataset, a path or a hub id, got {type(source).__name__}; "
            "datasets.Dataset.from_list turns a list of records into a dataset"
        )
    path = Path(source)
    if path.is_file():
        return _open_files([path], path.parent)
    if not path.exists():
        return OpenedTable(_from_hub(str(source), split), None, str(source))
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        loaded = datasets.load_from_disk(str(path))
        picked = _pick(loaded, split, str(path)) if isinstance(loaded, datasets.DatasetDict) else loaded
        return OpenedTable(picked, path, str(path))
    return _open_files(files_of_split(path, split), path)


def files_of_split(folder: Path, split: str) -> list[Path]:
    """Data files of a split in a folder and its sub-folder ``data``, all of one format.

    Raises:
        ValueError: there are none, or several formats hold the split.
    """
    files = sorted(
        file
        for place in (folder, folder / "data", folder / split, folder / "data" / split)
        if place.is_dir()
        for file in place.iterdir()
        if file.suffix in SUFFIXES and file.is_file()
    )
    exact = [file for file in files if split in (file.parent.name, _base_name(file))]
    named = exact or [file for file in files if split in _words(file)]
    is_split = any(_words(file) & {"train", "test", "validation", "val", "valid", "dev"} for file in files)
    chosen = named or ([] if is_split else files)
    formats = sorted({file.suffix for file in chosen})
    if len(formats) != 1:
        found = [str(file.relative_to(folder)) for file in files[:8]]
        problem = f"files of several formats {formats}; pass one of the files" if formats else "no data file"
        raise ValueError(f"{folder} has {problem} for the split {split!r}; expected {list(SUFFIXES)}, found {found}")
    return chosen


def _base_name(file: Path) -> str:
    """The name without suffix and shard number: "test_v1" for test_v1-00000-of-00002.parquet."""
    return re.split(r"-\d+-of-|\.", file.name)[0]


def _words(file: Path) -> set[str]:
    return set(re.split(r"[-_]", _base_name(file))) | {file.parent.name}


def _open_files(files: list[Path], folder: Path) -> OpenedTable:
    import datasets
    import pyarrow as pa

    suffix, name = files[0].suffix, str(files[0] if len(files) == 1 else folder)
    if suffix not in SUFFIXES:
        raise ValueError(f"{files[0]} has the suffix {suffix!r}; expected one of {list(SUFFIXES)}")
    if suffix in (".json", ".jsonl"):
        tables, damaged, rows = [], {}, 0
        for file in files:
            table, bad = read_json_rows(file)
            damaged.update({rows + index: reason for index, reason in bad.items()})
            tables.append(datasets.Dataset(table, fingerprint=_fingerprint(file)))
            rows += len(table)
        return OpenedTable(
            tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables), folder, name, damaged
        )
    if suffix == ".csv":
        table = pa.concat_tables([_read_csv(file) for file in files], promote_options="permissive")
        dataset = datasets.Dataset(table, fingerprint=_fingerprint(*files))
        if all(column in dataset.column_names for column in INDEX_COLUMNS):
            dataset = _indexed_rows(dataset, folder)
        return OpenedTable(dataset, folder, name)
    loader = "parquet" if suffix == ".parquet" else "arrow"
    paths = [str(file) for file in files]
    return OpenedTable(datasets.load_dataset(loader, data_files=paths, split="train"), folder, name)


def _fingerprint(*files: Path) -> str:
    """Identity of files for `datasets`, which would otherwise hash all their rows."""
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _read_csv(file: Path) -> Any:
    """A csv file with text columns, lines of several lines allowed."""
    import pyarrow as pa
    from pyarrow import csv

    encoding = text_encoding(file)
    with file.open(encoding=encoding, errors="replace") as text:
        names = next(iter(text), "").strip().replace('"', "").split(",")
    types = {name: pa.string() for name in names if name not in INDEX_COLUMNS[1:]}
    try:
        return csv.read_csv(
            file,
            read_options=csv.ReadOptions(encoding="utf8" if encoding == "utf-8-sig" else encoding),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=types),
        )
    except (pa.ArrowInvalid, UnicodeError) as error:
        raise ValueError(f"{file} cannot be read as csv: {error}; save it as UTF-8") from error


def _indexed_rows(index: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """The rows that an index of parquet files names, in its order.

    Args:
        index: columns ``parquet_path`` (relative to the index), ``row_group`` and ``row_index`` (inside the group).

    Raises:
        ValueError: a file is missing, or a row lies outside of it.
    """
    import datasets
    import numpy as np
    import pyarrow.parquet as pq

    columns = index.with_format("arrow")[:]
    encoded = columns["parquet_path"].combine_chunks().dictionary_encode()
    paths = [folder / name for name in encoded.dictionary.to_pylist()]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"the index names {len(missing)} parquet files that do not exist, e.g. {missing[0]}")
    sizes = [[meta.row_group(i).num_rows for i in range(meta.num_row_groups)] for meta in map(pq.read_metadata, paths)]
    flat = np.array([rows for group in sizes for rows in group], np.int64)
    counts = np.array([len(group) for group in sizes])
    file = encoded.indices.to_numpy()
    group, row = (columns[name].to_numpy().astype(np.int64) for name in ("row_group", "row_index"))
    inside = (group >= 0) & (group < counts[file])
    place = np.where(inside, np.cumsum(counts)[file] - counts[file] + group, 0)
    inside &= (row >= 0) & (row < flat[place])
    if not inside.all():
        line = int(np.flatnonzero(~inside)[0])
        raise ValueError(
            f"line {line} of the index names row {row[line]} of row group {group[line]} of {paths[file[line]]}, whose "
            f"row groups have {sizes[file[line]]} rows"
        )
    chosen = (np.cumsum(flat) - flat)[place] + row
    loaded = datasets.load_dataset("parquet", data_files=[str(path) for path in paths], split="train")
    return loaded.select(chosen)


def _pick(splits: Any, split: str, where: str) -> datasets.Dataset:
    if split not in splits:
        raise ValueError(f"{where} has no split {split!r}; it has {sorted(splits)}")
    return splits[split]


def _from_hub(name: str, split: str) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name!r} is neither a path here nor a dataset that can be downloaded: {error}") from error
    except (RuntimeError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"datasets cannot load {name!r}: {error}. Download its files (hf download {name} --repo-type dataset "
            "--local-dir FOLDER) and pass FOLDER or the file of the split."
        ) from error
