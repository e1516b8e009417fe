from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dina_reward.data import PreferenceReader, read_preferences
from tests.data.preference_files import all_pairs, first_preferred, number, png, write_image, write_json, write_parquet


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in range(12):
        write_image(tmp_path / "images" / f"{name}.jpg", name)
    return tmp_path


def better_than(reader: PreferenceReader) -> list[tuple[int, int]]:
    """Winner and loser of every pair."""
    pairs = [(pair, number(pair.a), number(pair.b)) for pair in all_pairs(reader)]
    assert all(pair.p_a in (0, 1) for pair, _, _ in pairs)
    return [(a, b) if pair.p_a == 1 else (b, a) for pair, a, b in pairs]


def test_hpdv2_training_pairs(images: Path) -> None:
    rows = [
        {"prompt": "p0", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0]},
        {"prompt": "p1", "file_path": ["2.jpg", "3.jpg"], "human_preference": [0, 1]},
        {"prompt": "p2", "file_path": ["4.jpg", "5.jpg"], "human_preference": [1, 1]},
    ]
    reader = read_preferences(write_json(images / "train.json", rows), image_root=images / "images")
    assert reader.schema == "hpdv2"
    assert [first_preferred(pair, 2 * index) for index, pair in enumerate(all_pairs(reader))] == [1, 0, 0.5]
    assert {reader[1].a_name, reader[1].b_name} == {"2.jpg", "3.jpg"}
    assert reader.rankings is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"file_path": ["0.jpg"]}, "file_path does not hold two paths: ['0.jpg']"),
        ({"file_path": ["0.jpg", None]}, "file_path has an empty place: ['0.jpg', None]"),
        ({"file_path": ["0.jpg", 5]}, "file_path has the wrong type"),
        ({"human_preference": [1, 0, 0]}, "human_preference does not hold two numbers"),
        ({"human_preference": [1, 2]}, "human_preference is neither 0 nor 1"),
        ({"human_preference": None}, "human_preference is missing"),
        ({"human_preference": ["yes", "no"]}, "human_preference has the wrong type"),
    ],
)
def test_broken_hpdv2_pairs(images: Path, values: dict[str, Any], reason: str) -> None:
    good = {"prompt": "p", "file_path": ["0.jpg", "1.jpg"], "human_preference": [1, 0]}
    path = write_json(images / "train.json", [good, {**good, **values}])
    reader = read_preferences(path, image_root=images / "images", max_broken=0.5)
    assert better_than(reader) == [(0, 1)]
    assert reader.report.count == 1
    assert reader.report.first[0][0] == 1
    assert reader.report.first[0][1].startswith(reason)


@pytest.fixture
def hpdv2_test(images: Path) -> Path:
    rows = [
        {"prompt": "p0", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [2, 1, 3], "raw_annotations": []},
        {"prompt": "p1", "image_path": ["3.jpg", "4.jpg"], "rank": [1], "raw_annotations": []},
        {"prompt": "p2", "image_path": ["5.jpg", "6.jpg", "7.jpg"], "rank": [1, 1, 4], "raw_annotations": []},
        {"prompt": "p3", "image_path": ["8.jpg"], "rank": [1], "raw_annotations": []},
    ]
    return write_json(images / "test.json", rows)


def test_hpdv2_rankings(images: Path, hpdv2_test: Path) -> None:
    reader = read_preferences(hpdv2_test, image_root=images / "images", max_broken=0.5)
    assert better_than(reader) == [(1, 0), (0, 2), (1, 2), (5, 7), (6, 7)]
    assert [pair.group for pair in all_pairs(reader)] == ["0"] * 3 + ["2"] * 2
    assert reader.report.dropped == {"equal ranks in a ranking": 1}
    assert reader.report.first == [
        (1, "image_path and rank differ in length: [2, 1]"),
        (3, "image_path has fewer than two images: 1"),
    ]
    with pytest.raises(ValueError, match=r"2 of 4 rows are broken \(50.00%\), more than max_broken=0.01"):
        read_preferences(hpdv2_test, image_root=images / "images")


def test_raw_rankings_stay_at_hand(images: Path, hpdv2_test: Path) -> None:
    reader = read_preferences(hpdv2_test, image_root=images / "images", max_broken=0.5, max_pairs_per_prompt=1)
    assert [pair.group for pair in all_pairs(reader)] == ["0", "2"]
    assert reader.rankings is not None
    first, second = reader.rankings
    assert (first.prompt, first.group, first.ranks) == ("p0", "0", (2, 1, 3))
    assert (second.prompt, second.group, second.ranks) == ("p2", "2", (1, 1, 4))
    assert second.names == ("5.jpg", "6.jpg", "7.jpg")
    assert [number(second.image(item)) for item in range(len(second))] == [5, 6, 7]
    assert reader.rankings[-1].group == "2"
    assert [ranking.group for ranking in reader.rankings[:1]] == ["0"]
    with pytest.raises(IndexError):
        reader.rankings[2]


def test_imagereward_rows_become_pairs_within_a_prompt(tmp_path: Path) -> None:
    ranks = [("a-1", 2), ("b-2", 1), ("a-1", 1), ("a-1", 2), ("b-2", 2), ("c-3", 1), ("a-1", 5)]
    rows = [
        {
            "image": {"bytes": png(index), "path": f"{index}.webp"},
            "prompt_id": prompt_id,
            "prompt": f"prompt {prompt_id}",
            "classification": "People",
            "image_amount_in_total": 4,
            "rank": rank,
            "overall_rating": 5,
            "image_text_alignment_rating": 5,
            "fidelity_rating": 5,
        }
        for index, (prompt_id, rank) in enumerate(ranks)
    ]
    reader = read_preferences(write_parquet(tmp_path / "train.parquet", rows))
    assert reader.schema == "imagereward"
    assert better_than(reader) == [(2, 0), (0, 6), (2, 3), (2, 6), (3, 6), (1, 4)]
    assert [pair.group for pair in all_pairs(reader)] == ["a-1"] * 5 + ["b-2"]
    assert {pair.prompt for pair in all_pairs(reader)} == {"prompt a-1", "prompt b-2"}
    assert reader.report.dropped == {"equal ranks in a ranking": 1}
    assert reader.rankings is not None
    assert [ranking.ranks for ranking in reader.rankings] == [(2, 1, 2, 5), (1, 2), (1,)]
    rows[2]["rank"] = None
    reader = read_preferences(write_parquet(tmp_path / "gap.parquet", rows), max_broken=0.2)
    assert better_than(reader) == [(0, 6), (3, 6), (1, 4)]
    assert reader.report.first == [(2, "rank is missing")]


def test_imagereward_benchmark_with_ties_and_gaps(images: Path) -> None:
    rows = [
        {"id": "000904-0035", "prompt": "p0", "generations": [f"images/{n}.jpg" for n in range(4)]},
        {"id": "7", "prompt": "p1", "generations": ["images/4.jpg", "images/5.jpg"]},
        {"id": "8", "prompt": "p2", "generations": ["images/6.jpg", "images/7.jpg"]},
    ]
    for row, ranking in zip(rows, ([1, 3, 1, 6], [2, 1], [1, "null"]), strict=True):
        row["ranking"] = ranking  # type: ignore[assignment]
    reader = read_preferences(write_json(images / "benchmark-prompts.json", rows), split="test", max_broken=0.4)
    assert reader.schema == "imagereward_benchmark"
    assert better_than(reader) == [(0, 1), (0, 3), (2, 1), (1, 3), (2, 3), (5, 4)]
    assert [pair.group for pair in all_pairs(reader)] == ["000904-0035"] * 5 + ["7"]
    assert reader.report.count == 1
    assert reader.report.first[0][0] == 2
