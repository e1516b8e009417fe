from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dina_reward.data import read_preferences
from dina_reward.data.sides import VideoFile
from tests.data.preference_files import all_pairs, first_preferred, png, write_image, write_json, write_parquet


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in range(20):
        write_image(tmp_path / f"{name}.png", name)
    return tmp_path


def hpdv3(number: int, **values: Any) -> dict[str, Any]:
    row = {"prompt": f"prompt {number}", "path1": f"{2 * number}.png", "path2": f"{2 * number + 1}.png"}
    return {**row, "model1": "flux", "model2": "kolors", "confidence": None, "choice_dist": None, **values}


class TestHPDv3:
    def test_path1_is_preferred_and_votes_are_soft_labels(self, images: Path) -> None:
        rows = [hpdv3(0), hpdv3(1, choice_dist=[9, 1]), hpdv3(2, choice_dist="null", confidence="null")]
        rows += [hpdv3(3, choice_dist=[1, 3]), hpdv3(4, choice_dist=[2, 2])]
        reader = read_preferences(write_json(images / "train.json", rows))
        assert reader.schema == "hpdv3"
        labels = [first_preferred(pair, 2 * index) for index, pair in enumerate(all_pairs(reader))]
        assert labels == pytest.approx([1, 0.9, 1, 0.75, 0.5])
        assert reader.report.count == 0
        hard = read_preferences(images / "train.json", soft_labels=False)
        assert [first_preferred(pair, 2 * index) for index, pair in enumerate(all_pairs(hard))] == [1] * 5

    def test_record(self, images: Path) -> None:
        rows = [hpdv3(0, model2="FLUX"), hpdv3(1, source="real"), hpdv3(2, model1=None), hpdv3(3, model2="null")]
        pairs = all_pairs(read_preferences(write_json(images / "train.json", rows)))
        assert [pair.source for pair in pairs] == ["FLUX / flux", "real", "hpdv3", "hpdv3"]
        assert {pairs[0].a_name, pairs[0].b_name} == {"0.png", "1.png"}
        assert (pairs[1].prompt, pairs[1].group, pairs[1].weight) == ("prompt 1", "prompt 1", 1)

    @pytest.mark.parametrize("as_text", [False, True])
    def test_confidence_filter_keeps_what_is_unknown(self, images: Path, as_text: bool) -> None:
        values: list[Any] = [0.95, 0.9, None, "null", 0.99]
        if as_text:
            values = [None if value is None else str(value) for value in values]
        rows = [hpdv3(number, confidence=value) for number, value in enumerate(values)]
        reader = read_preferences(write_json(images / "train.json", rows), min_confidence=0.95)
        assert [pair.prompt for pair in all_pairs(reader)] == ["prompt 0", "prompt 2", "prompt 3", "prompt 4"]
        assert reader.report.dropped == {"confidence below 0.95": 1}
        assert reader.report.count == 0

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"prompt": None}, "prompt is missing"),
            ({"prompt": 5}, "prompt has the wrong type: 5"),
            ({"path1": None}, "path1 is missing"),
            ({"path2": ""}, "path2 is missing"),
            ({"path2": ["a", "b"]}, "path2 has the wrong type"),
            ({"confidence": "high"}, "confidence has the wrong type: 'high'"),
            ({"confidence": [1]}, "confidence has the wrong type"),
            ({"choice_dist": [1, 2, 3]}, "choice_dist does not hold two numbers"),
            ({"choice_dist": [1, None]}, "choice_dist has an empty place"),
            ({"choice_dist": [-1, 4]}, "choice_dist has negative votes"),
            ({"choice_dist": "many"}, "choice_dist has the wrong type"),
        ],
    )
    def test_broken_rows_are_reported(self, images: Path, values: dict[str, Any], reason: str) -> None:
        rows = [hpdv3(0, confidence=0.97, choice_dist=[3, 1]), hpdv3(1, **values), hpdv3(2)]
        path = write_json(images / "train.json", rows)
        reader = read_preferences(path, max_broken=0.4)
        assert [pair.prompt for pair in all_pairs(reader)] == ["prompt 0", "prompt 2"]
        assert reader.report.count == 1
        assert reader.report.first[0][0] == 1
        assert reader.report.first[0][1].startswith(reason)
        with pytest.raises(
            ValueError, match=r"1 of 3 rows are broken \(33.33%\)(.|\n)*row 1: " + reason.split(":")[0]
        ):
            read_preferences(path)


def pickapic(number: int, label: float, stored: Any = bytes, **values: Any) -> dict[str, Any]:
    images = [png(2 * number), png(2 * number + 1)]
    sides = images if stored is bytes else [{"bytes": image, "path": "image.jpg"} for image in images]
    row = {"caption": f"prompt {number // 2}", "jpg_0": sides[0], "jpg_1": sides[1], "label_0": label}
    row |= {"label_1": 1 - label, "image_0_uid": f"uid{2 * number}", "image_1_uid": f"uid{2 * number + 1}"}
    row |= {"has_label": True, "are_different": True, "num_example_per_prompt": 4, "model_0": "x", "model_1": "w"}
    return {**row, **values}


class TestPickAPic:
    @pytest.mark.parametrize("stored", [bytes, dict])
    def test_labels_ties_and_weights(self, tmp_path: Path, stored: Any) -> None:
        rows = [pickapic(0, 1.0, stored), pickapic(1, 0.0, stored, num_example_per_prompt=1), pickapic(2, 0.5, stored)]
        reader = read_preferences(write_parquet(tmp_path / "train.parquet", rows))
        pairs = all_pairs(reader)
        assert [first_preferred(pair, 2 * index) for index, pair in enumerate(pairs)] == [1, 0, 0.5]
        assert reader.labels.weight.tolist() == [pair.weight for pair in pairs] == [0.25, 1, 0.25]
        assert {(pair.a_name, pair.b_name)[pair.a_name > pair.b_name] for pair in pairs} == {"uid0", "uid2", "uid4"}
        assert [pair.group for pair in pairs] == ["prompt 0", "prompt 0", "prompt 1"]
        assert {pair.source for pair in pairs} == {"w / x"}

    def test_rows_without_label_and_equal_images_are_left_out_by_name(self, tmp_path: Path) -> None:
        rows = [pickapic(0, 1), pickapic(1, 0.5, has_label=False, label_0=None, label_1=None)]
        rows += [pickapic(2, 1, are_different=False), pickapic(3, 0)]
        reader = read_preferences(write_parquet(tmp_path / "train.parquet", rows))
        assert len(reader) == 2
        assert reader.report.dropped == {"no label": 1, "one image twice": 1}
        assert reader.report.count == 0

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            ({"label_1": None}, "label_0 or label_1 is missing"),
            ({"label_1": 1}, "label_0 and label_1 are no shares of one"),
            ({"jpg_1": None}, "jpg_1 is missing"),
            ({"num_example_per_prompt": 0}, "num_example_per_prompt is not positive: 0.0"),
        ],
    )
    def test_broken_rows(self, tmp_path: Path, values: dict[str, Any], reason: str) -> None:
        path = write_parquet(tmp_path / "train.parquet", [pickapic(0, 1), pickapic(1, 1, **values)])
        reader = read_preferences(path, max_broken=0.5)
        assert len(reader) == 1
        assert reader.report.first[0][0] == 1
        assert reader.report.first[0][1].startswith(reason)

    def test_an_empty_struct_is_a_missing_image(self, tmp_path: Path) -> None:
        rows = [pickapic(0, 1, dict), pickapic(1, 1, dict, jpg_0={"bytes": None, "path": None})]
        reader = read_preferences(write_parquet(tmp_path / "train.parquet", rows), max_broken=0.5)
        assert reader.report.first == [(1, "jpg_0 is missing")]

    def test_weights_are_one_without_the_column(self, tmp_path: Path) -> None:
        row = pickapic(0, 1)
        del row["num_example_per_prompt"], row["has_label"], row["are_different"], row["image_0_uid"]
        pair = read_preferences(write_parquet(tmp_path / "train.parquet", [row]))[0]
        assert pair.weight == 1
        assert sorted([pair.a_name[:7], pair.b_name]) == ["sha256:", "uid1"]


def test_genai_bench(tmp_path: Path) -> None:
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote", "leftvote"]
    rows = [
        {
            "prompt": f"p{index}",
            "left_model": "PlayGround",
            "left_image": {"bytes": png(2 * index), "path": None},
            "right_model": "LCM",
            "right_image": {"bytes": png(2 * index + 1), "path": None},
            "vote_type": vote,
        }
        for index, vote in enumerate(votes)
    ]
    reader = read_preferences(write_parquet(tmp_path / "test_v1-00000-of-00001.parquet", rows), split="test_v1")
    pairs = all_pairs(reader)
    assert [pair.prompt for pair in pairs] == ["p0", "p1", "p2", "p4"]
    assert [first_preferred(pair, 2 * index) for pair, index in zip(pairs, (0, 1, 2, 4), strict=True)] == [
        1,
        0,
        0.5,
        1,
    ]
    assert {pair.source for pair in pairs} == {"LCM / PlayGround"}
    assert reader.report.dropped == {"both bad": 1}
    assert reader.report.count == 0
    rows[1]["vote_type"] = "upvote"
    with pytest.raises(ValueError, match=r"row 1: vote_type is none of \['left', 'right', 'tie', 'bothbad'\]: 'up'"):
        read_preferences(write_parquet(tmp_path / "other.parquet", rows))


class TestVideoGen:
    @pytest.fixture
    def csv(self, tmp_path: Path) -> Path:
        text = (
            "path_A,path_B,A_model,B_model,prompt,VQ,MQ,TA,Overall\n"
            'a/0.mp4,b/0.mp4,gen2,kling,"a cat, running",A,B,same,A\n'
            'a/1.mp4,b/1.mp4,gen2,kling,"two\nlines",B,same,A,same\n'
        )
        path = tmp_path / "videogen-rewardbench.csv"
        path.write_text(text, encoding="utf-8")
        return path

    @pytest.mark.parametrize(
        ("dimension", "expected"), [("Overall", [1, 0.5]), ("VQ", [1, 0]), ("MQ", [0, 0.5]), ("TA", [0.5, 1])]
    )
    def test_dimensions(self, csv: Path, dimension: str, expected: list[float]) -> None:
        pairs = all_pairs(read_preferences(csv, dimension=dimension))
        firsts = [csv.parent / "a" / f"{index}.mp4" for index in range(2)]
        labels = [first_preferred(*item, side=lambda video: video.path) for item in zip(pairs, firsts, strict=True)]
        assert labels == expected
        assert [pair.prompt for pair in pairs] == ["a cat, running", "two\nlines"]
        assert isinstance(pairs[0].a, VideoFile)
        assert pairs[0].source == "gen2 / kling"

    def test_unknown_dimension(self, csv: Path) -> None:
        with pytest.raises(ValueError, match=r"has the dimensions \['VQ', 'MQ', 'TA', 'Overall'\], not 'quality'"):
            read_preferences(csv, dimension="quality")

    def test_another_word_is_a_broken_row(self, csv: Path) -> None:
        csv.write_text(csv.read_text().replace("TA,Overall\n", "TA,Overall\na/9.mp4,b/9.mp4,x,y,p,A,A,A,C\n"))
        reader = read_preferences(csv, max_broken=0.4)
        assert reader.report.first == [(0, "Overall is none of ['a', 'b', 'same']: 'c'")]


def test_rapidata_votes(tmp_path: Path) -> None:
    votes = [(3, 1), (0, 5), (2, 2), (0.5, 1.5)]
    rows = [
        {
            "prompt": "p",
            "image1": {"bytes": png(2 * index), "path": "image.png"},
            "image2": {"bytes": png(2 * index + 1), "path": "image.png"},
            "votes_image1": first,
            "votes_image2": second,
        }
        for index, (first, second) in enumerate(votes)
    ]
    path = write_parquet(tmp_path / "train.parquet", rows)

    def labels(**options: Any) -> list[float]:
        return [first_preferred(p, 2 * index) for index, p in enumerate(all_pairs(read_preferences(path, **options)))]

    assert labels() == pytest.approx([0.75, 0, 0.5, 0.25])
    assert labels(soft_labels=False) == [1, 0, 0.5, 0]
    sure = read_preferences(path, min_confidence=0.75)
    np.testing.assert_allclose(np.maximum(sure.labels.p_a, 1 - sure.labels.p_a), [0.75, 1, 0.75])
    rows[0] |= {"votes_image1": 0, "votes_image2": 0}
    rows[1] |= {"votes_image1": -1}
    report = read_preferences(write_parquet(tmp_path / "broken.parquet", rows), max_broken=0.5).report
    assert report.first == [(0, "no votes"), (1, "negative votes")]
