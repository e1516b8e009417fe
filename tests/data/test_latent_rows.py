"""The latents that the published reward was trained on, as training rows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dina_reward.data import LatentRows, collate_preferences, load_preferences, read_preferences
from tests.data.preference_files import npy, png, write_parquet


def published(number: int, size: tuple[int, int] = (4, 4), other: tuple[int, int] | None = None, **values: Any) -> Any:
    """A row whose preferred latent holds ``number``, and the other one its negative."""
    row: dict[str, Any] = {"prompt": f"prompt {number // 2}", "detailed_results": None}
    for side, sign, (height, width) in (("latent1", 1, size), ("latent2", -1, other or size)):
        row[side] = npy(np.full((2, height, width), sign * number, np.float16))
        row[f"{side}_shape"] = [2, height, width]
    return {**row, **values}


def write(tmp_path: Path, rows: list[Any]) -> Path:
    return write_parquet(tmp_path / "train.parquet", rows)


def preferred(row: dict[str, Any]) -> float:
    """Number of the latent that people prefer."""
    side = row["chosen"] if row["p_chosen"] > 0.5 else row["rejected"]
    return float(side[0, 0, 0])


def test_rows_of_every_place_that_can_hold_them(tmp_path: Path) -> None:
    rows = [published(number) for number in range(1, 7)]
    (tmp_path / "shards").mkdir()
    path = write(tmp_path / "shards", rows)
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    index = path.parent / "index.csv"
    lines = "".join(f"{number},{path.name},0,{number},32,32,0\n" for number in range(6))
    index.write_text("global_id,parquet_path,row_group,row_index,width,height,bucket_id\n" + lines)
    for place in (path, path.parent, tmp_path / "saved", index):
        loaded = load_preferences(place)
        assert isinstance(loaded, LatentRows)
        assert [preferred(row) for row in loaded] == [1, 2, 3, 4, 5, 6]
    batch = collate_preferences([loaded[index] for index in range(6)])
    assert batch["chosen"].shape == (6, 2, 4, 4)
    assert 0 < batch["p_chosen"].sum() < 6  # sides are drawn


def test_shapes_become_buckets_and_pairs_of_two_shapes_are_left_out(tmp_path: Path) -> None:
    rows = [published(1), published(2, (4, 6)), published(3, (4, 6), (4, 4)), published(4), published(5, (4, 6))]
    rows.append(published(6, latent1_shape=None))
    loaded = LatentRows(read_preferences(write(tmp_path, rows)))
    assert [preferred(row) for row in loaded] == [1, 2, 4, 5]
    assert loaded.bucket_of is not None
    assert loaded.bucket_of.tolist() == [0, 1, 0, 1]
    assert loaded.reader.report.dropped == {"latents of two shapes or of an unknown one": 2}
    assert LatentRows(read_preferences(write_unshaped(tmp_path))).bucket_of is None


def write_unshaped(tmp_path: Path) -> Path:
    rows = [{k: v for k, v in published(1).items() if not k.endswith("_shape")}]
    return write_parquet(tmp_path / "unshaped.parquet", rows)


def test_filters(tmp_path: Path) -> None:
    results = ["{'confidence': 0.99}", "{'confidence': 0.5}", None, None, None]
    rows = [published(number, detailed_results=text, prompt="p") for number, text in enumerate(results, 1)]
    path = write(tmp_path, rows)
    assert len(load_preferences(path, min_confidence=0.95)) == 4
    assert len(load_preferences(path, min_confidence=0.95, max_pairs_per_prompt=3)) == 3
    datasets.Dataset.from_list([{"prompt": "p", "chosen": [[[1.0]]], "rejected": [[[0.0]]]}]).to_parquet(
        str(tmp_path / "plain.parquet")
    )
    with pytest.raises(
        ValueError, match="takes no min_confidence and max_pairs_per_prompt: these filters are for publ"
    ):
        load_preferences(tmp_path / "plain.parquet", min_confidence=0.95, max_pairs_per_prompt=3)


def test_a_broken_row_is_counted_and_adds_nothing_to_the_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [published(1), published(2, latent1=b"nothing"), published(3, (4, 6)), published(4)]
    loaded = LatentRows(read_preferences(write(tmp_path, rows), max_broken=0.3))
    with caplog.at_level(logging.WARNING):
        read = [loaded[index] for index in range(4)]
    assert [preferred(row) for row in read] == [1, 4, 3, 4]  # the next one of its shape stands in
    assert [row["weight"] for row in read] == [1, 0, 1, 1]
    ((row, reason),) = loaded.reader.report.first
    assert row == 1
    assert reason.startswith("latent1: the latent is no .npy array")
    assert "row 1 of the dataset: latent1" in caplog.text
    strict = LatentRows(read_preferences(write(tmp_path, rows), max_broken=0.2))
    with pytest.raises(ValueError, match="1 of 4 rows are broken"):
        strict[1]


def test_loader_workers_read_them(tmp_path: Path) -> None:
    loaded = LatentRows(read_preferences(write(tmp_path, [published(number) for number in range(1, 5)])))
    batches = list(DataLoader(loaded, batch_size=2, num_workers=1, collate_fn=collate_preferences))
    expected = collate_preferences([loaded[index] for index in range(4)])
    torch.testing.assert_close(torch.cat([batch["chosen"] for batch in batches]), expected["chosen"])


def test_images_are_refused(tmp_path: Path) -> None:
    row = {"prompt": "p", "path1": "a.png", "path2": "b.png"}
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png(1))
    with pytest.raises(
        ValueError, match="sides of type Image, not latents; make latents of images with dina-reward cache"
    ):
        LatentRows(read_preferences(datasets.Dataset.from_list([row]), image_root=tmp_path))
    loaded = LatentRows(read_preferences(write(tmp_path, [published(1)])))
    with pytest.raises(IndexError, match="row 1 of 1"):
        loaded[1]
