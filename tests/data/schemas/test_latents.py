from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from dina_reward.data import BrokenRowError, collate_preferences, read_preferences
from tests.data.preference_files import all_pairs, first_preferred, npy, png, write_parquet


LATENT = np.arange(32, dtype=np.float32).reshape(2, 4, 4)


def corner(latent: Any) -> float:
    assert isinstance(latent, Tensor)
    return float(latent[0, 0, 0])


class TestTRL:
    def test_images(self) -> None:
        columns = {"prompt": ["p0", "p1"], "p_chosen": [0.8, None], "weight": [2.0, 1.0]}
        for start, name in ((10, "chosen"), (20, "rejected")):
            columns[name] = [{"bytes": png(start + index), "path": None} for index in range(2)]  # type: ignore[misc]
        features = datasets.Features(
            {
                "prompt": datasets.Value("string"),
                "chosen": datasets.Image(),
                "rejected": datasets.Image(),
                "p_chosen": datasets.Value("float32"),
                "weight": datasets.Value("float32"),
            }
        )
        reader = read_preferences(datasets.Dataset.from_dict(columns, features=features))
        assert reader.schema == "trl"
        assert [first_preferred(pair, 10 + index) for index, pair in enumerate(all_pairs(reader))] == pytest.approx(
            [0.8, 1]
        )
        assert reader.labels.weight.tolist() == [2, 1]

    def test_a_label_that_is_nan_is_broken_and_one_that_is_missing_is_sure(self, tmp_path: Path) -> None:
        row = {"prompt": "a", "chosen": LATENT.tolist(), "rejected": LATENT.tolist()}
        rows = [{**row, "p_chosen": label} for label in (0.5, float("nan"), None)]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        reader = read_preferences(tmp_path / "rows.json", max_broken=0.5)
        assert max(reader.labels.p_a.tolist()) == 1 or min(reader.labels.p_a.tolist()) == 0
        assert (len(reader), reader.report.count) == (2, 1)
        assert "p_chosen is NaN" in str(reader.report)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("fixed", [True, False])
    def test_latents_keep_values_and_dtype(self, dtype: str, fixed: bool) -> None:
        feature: Any = datasets.Value(dtype)
        for _ in range(3):
            feature = datasets.List(feature)
        feature = datasets.Array3D((2, 4, 4), dtype) if fixed else feature
        rows = {"prompt": ["p"], "chosen": [LATENT.astype(dtype)], "rejected": [-LATENT.astype(dtype) - 1]}
        features = datasets.Features({"prompt": datasets.Value("string"), "chosen": feature, "rejected": feature})
        pair = read_preferences(datasets.Dataset.from_dict(rows, features=features), seed=1)[0]
        assert first_preferred(pair, 0.0, corner) == 1
        chosen = pair.a if pair.p_a == 1 else pair.b
        torch.testing.assert_close(chosen, torch.from_numpy(LATENT.astype(dtype)), rtol=0, atol=0)
        batch = collate_preferences([pair.training_row()])
        assert batch["p_chosen"].tolist() == [pair.p_a]
        assert pair.a_name != pair.b_name

    def test_ragged_latents_name_their_row(self) -> None:
        rows = {"prompt": ["p"], "chosen": [[[1.0, 2.0], [3.0]]], "rejected": [[[1.0, 2.0], [3.0, 4.0]]]}
        reader = read_preferences(datasets.Dataset.from_dict(rows))
        with pytest.raises(BrokenRowError, match=r"row 0 of the dataset: chosen: .*differ in length: \[2, 1\]"):
            reader[0]

    @pytest.mark.parametrize("values", [{"p_chosen": 1.5}, {"weight": -1.0}])
    def test_numbers_outside_their_range(self, values: dict[str, float]) -> None:
        row = {"prompt": "p", "chosen": "a.png", "rejected": "b.png", "p_chosen": 1.0, "weight": 1.0}
        dataset = datasets.Dataset.from_list([row, {**row, **values}])
        reader = read_preferences(dataset, max_broken=0.5)
        assert len(reader) == 1
        assert reader.report.first[0][1].startswith(f"{next(iter(values))} is not between 0 and")

    def test_an_image_against_a_latent_is_refused(self) -> None:
        dataset = datasets.Dataset.from_dict({"prompt": ["p"], "chosen": ["a.png"], "rejected": [[[1.0]]]})
        with pytest.raises(ValueError, match="chosen and rejected hold different things: string and list"):
            read_preferences(dataset)


def reference(number: int, results: str | None, **values: Any) -> dict[str, Any]:
    row = {"prompt": f"p{number}", "latent1": npy(LATENT + number), "latent2": npy(-LATENT - 1)}
    row |= {"latent1_shape": [2, 4, 4], "latent2_shape": [2, 4, 4], "detailed_results": results}
    return {**row, "model1": "flux", "model2": "sd3", **values}


VOTES = "{'votes_chosen': 9, 'votes_rejected': 1, 'confidence': 0.97}"


class TestReferenceLatents:
    def test_votes_and_confidence(self, tmp_path: Path) -> None:
        rows = [reference(0, VOTES), reference(1, "{'votes_chosen': None, 'confidence': 'null'}"), reference(2, None)]
        rows += [reference(3, '{"votes_chosen": 3, "votes_rejected": 1, "confidence": 0.9}')]
        path = write_parquet(tmp_path / "train.parquet", rows)
        labels = [first_preferred(pair, float(i), corner) for i, pair in enumerate(all_pairs(read_preferences(path)))]
        assert labels == pytest.approx([0.9, 1, 1, 0.75])
        sure = read_preferences(path, min_confidence=0.95, soft_labels=False)
        assert [first_preferred(pair, float(index), corner) for index, pair in enumerate(all_pairs(sure))] == [1, 1, 1]
        assert sure.report.dropped == {"confidence below 0.95": 1}

    @pytest.mark.parametrize("results", ["{'votes_chosen': ", "[1, 2]", "open('FILE', 'w')", "{'votes_chosen': 'x'}"])
    def test_other_text_is_a_broken_row_and_never_run(self, tmp_path: Path, results: str) -> None:
        results = results.replace("FILE", str(tmp_path / "written"))
        path = write_parquet(tmp_path / "train.parquet", [reference(0, VOTES), reference(1, results)])
        reader = read_preferences(path, max_broken=0.5)
        assert len(reader) == 1
        assert reader.report.first[0][1].startswith("detailed_results is not the text of a dict with numbers")
        assert not (tmp_path / "written").exists()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"latent1": b"nothing"}, "latent1: the latent is no .npy array"),
            ({"latent1": npy(np.array([{}], dtype=object))}, "latent1: the latent is no .npy array"),
            ({"latent2": npy(np.full_like(LATENT, np.nan))}, "latent2: the latent has NaN or infinite"),
            ({"latent2_shape": [2, 4, 5]}, r"latent2: the latent has shape \(2, 4, 4\), its row says \(2, 4, 5\)"),
            ({"latent1": npy(LATENT.astype(np.uint8))}, "latent1: expected a latent.*array of uint8"),
        ],
    )
    def test_unusable_latents(self, tmp_path: Path, values: dict[str, Any], message: str) -> None:
        reader = read_preferences(write_parquet(tmp_path / "train.parquet", [reference(0, VOTES, **values)]))
        with pytest.raises(BrokenRowError, match=message):
            reader.check(0)

    def test_a_leading_batch_dimension_goes(self, tmp_path: Path) -> None:
        row = reference(0, VOTES, latent1=npy(LATENT[None]), latent1_shape=[1, 2, 4, 4])
        pair = read_preferences(write_parquet(tmp_path / "train.parquet", [row]))[0]
        assert isinstance(pair.a, Tensor)
        assert isinstance(pair.b, Tensor)
        assert pair.a.shape == pair.b.shape == (2, 4, 4)

    def test_index_csv_chooses_and_orders_rows(self, tmp_path: Path) -> None:
        for file in (0, 1):
            rows = [reference(10 * file + row, VOTES) for row in range(5)]
            write_parquet(tmp_path / f"part{file}.parquet", rows, row_group_size=2)
        lines = ["part1.parquet,2,0", "part0.parquet,1,1", "part1.parquet,0,1"]
        index = tmp_path / "index.csv"
        header = "global_id,parquet_path,row_group,row_index,width,height,bucket_id\n"
        index.write_text(header + "".join(f"{n},{line},1024,1024,2\n" for n, line in enumerate(lines)))
        assert [pair.prompt for pair in all_pairs(read_preferences(index))] == ["p14", "p3", "p11"]
        index.write_text(header + "0,part0.parquet,2,1,1024,1024,2\n")
        with pytest.raises(ValueError, match=r"names row 1 of row group 2 of .*part0.parquet.*\[2, 2, 1\] rows"):
            read_preferences(index)
        index.write_text(header + "0,part7.parquet,0,0,1024,1024,2\n")
        with pytest.raises(ValueError, match=r"1 parquet files that do not exist, e.g. .*part7.parquet"):
            read_preferences(index)
