from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dina_reward.data import BrokenRowError, PreferenceReader, read_preferences
from dina_reward.data.schemas import SCHEMAS
from tests.data.preference_files import all_pairs, first_preferred, number, write_image, write_json


def pairs_of(count: int, prompts: int | None = None) -> datasets.Dataset:
    """Comparisons ``a0`` > ``b0``, ``a1`` > ``b1``, ...; the files do not exist."""
    names = range(count)
    return datasets.Dataset.from_dict(
        {
            "prompt": [f"prompt {name % (prompts or count)}" for name in names],
            "path1": [f"a{name}" for name in names],
            "path2": [f"b{name}" for name in names],
        }
    )


def shown_first(reader: PreferenceReader) -> np.ndarray:
    """Whether the published order is kept, for every pair."""
    return reader.labels.p_a == 1


class TestSides:
    def test_a_fair_coin_that_repeats(self) -> None:
        dataset = pairs_of(4000)
        zero, again, one = (shown_first(read_preferences(dataset, seed=seed)) for seed in (0, 0, 1))
        np.testing.assert_array_equal(zero, again)
        for sides in (zero, one):
            assert abs(sides.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
        assert abs((zero == one).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
        assert abs((zero[1:] == zero[:-1]).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)

    def test_known_draw(self) -> None:
        """Sides are part of what a seed means: a change would make old runs impossible to repeat."""
        assert shown_first(read_preferences(pairs_of(12), seed=7)).astype(int).tolist() == [
            *(0, 1, 1, 0, 1, 1),
            *(1, 1, 0, 0, 1, 1),
        ]

    def test_filters_and_further_rows_leave_sides_alone(self) -> None:
        everything = shown_first(read_preferences(pairs_of(100), seed=3))
        np.testing.assert_array_equal(shown_first(read_preferences(pairs_of(60), seed=3)), everything[:60])
        limited = read_preferences(pairs_of(100, prompts=10), seed=3, max_pairs_per_prompt=4)
        np.testing.assert_array_equal(shown_first(limited), everything[limited.pair_numbers])

    def test_labels_and_names_follow_the_sides(self) -> None:
        reader = read_preferences(pairs_of(50))
        assert 0 < shown_first(reader).sum() < 50
        for index in range(50):
            expected = (f"a{index}", f"b{index}")
            assert reader.names(index) == (expected if reader.labels.p_a[index] == 1 else expected[::-1])

    def test_negative_seed(self) -> None:
        with pytest.raises(ValueError, match="seed must be an integer of at least 0 .*, got -1"):
            read_preferences(pairs_of(2), seed=-1)


class TestLimit:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 5), st.integers(0, 5))
    def test_each_prompt_keeps_its_share(self, prompts: list[int], limit: int, seed: int) -> None:
        columns: dict[str, list[Any]] = {
            name: [f"{name}{i}" for i in range(len(prompts))] for name in ("path1", "path2")
        }
        dataset = datasets.Dataset.from_dict({"prompt": [f"p{prompt}" for prompt in prompts], **columns})
        reader = read_preferences(dataset, max_pairs_per_prompt=limit, seed=seed)
        kept = [prompts[number] for number in reader.pair_numbers]
        assert {prompt: kept.count(prompt) for prompt in kept} == {p: min(limit, prompts.count(p)) for p in prompts}
        assert sorted(reader.pair_numbers) == reader.pair_numbers.tolist()
        left_out = reader.report.dropped.get(f"more than {limit} pairs of a prompt", 0)
        assert left_out == len(prompts) - len(kept)

    def test_the_choice_is_random_and_repeats(self) -> None:
        dataset = pairs_of(200, prompts=20)
        chosen = [
            read_preferences(dataset, max_pairs_per_prompt=3, seed=seed).pair_numbers.tolist() for seed in (0, 0, 1)
        ]
        assert chosen[0] == chosen[1] != chosen[2]
        assert max(chosen[0]) > 100

    def test_positive(self) -> None:
        with pytest.raises(ValueError, match="max_pairs_per_prompt must be an integer of at least 1, got 0"):
            read_preferences(pairs_of(2), max_pairs_per_prompt=0)


class TestBroken:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        rows = []
        for index in range(10):
            row = {"prompt": f"p{index}", "path1": f"{2 * index}.png", "path2": f"{2 * index + 1}.png"}
            rows.append(row)
            for name in (row["path1"], row["path2"]):
                write_image(tmp_path / name, int(name.split(".")[0]))
        write_json(tmp_path / "train.json", rows)
        return tmp_path

    def test_images_are_checked_when_they_are_read(self, folder: Path) -> None:
        (folder / "5.png").write_bytes(b"no image")
        (folder / "8.png").unlink()
        (folder / "10.png").write_bytes((folder / "10.png").read_bytes()[:50])
        reader = read_preferences(folder)
        reader.check(0)
        with pytest.raises(
            BrokenRowError, match=rf"row 2 of the dataset: path2: .*\({folder}/5.png\): cannot identify"
        ):
            reader.check(2)
        with pytest.raises(ValueError, match=rf"row 4 of the dataset: path1: {folder}/8.png does not exist"):
            reader[4]
        with pytest.raises(ValueError, match=r"row 5 of the dataset: path1: .*10.png"):
            reader[5]
        assert reader.report.count == 0

    def test_reading_all_counts_and_stops_past_the_share(self, folder: Path) -> None:
        for name in ("5.png", "8.png"):
            (folder / name).write_bytes(b"no image")
        reader = read_preferences(folder, max_broken=0.2)
        for _ in range(2):
            assert [first_preferred(pair, 2 * i) for pair, i in zip(reader.readable(), (0, 1, 3), strict=False)] == [
                1
            ] * 3
            assert len(list(reader.readable())) == 8
            assert reader.report.count == 2
        assert [index for index, _ in reader.report.first] == [2, 4]
        assert reader.report.reasons == {"path2": 1, "path1": 1}
        assert [pair.prompt for pair in reader.readable([9, 4, 1])] == ["p9", "p1"]
        strict = read_preferences(folder, max_broken=0.1)
        with pytest.raises(
            ValueError, match=r"2 of 10 rows are broken \(20.00%\), more than max_broken=0.1 allows(.|\n)*row 4"
        ):
            list(strict.readable())

    @pytest.mark.parametrize(("broken", "passes"), [(0, True), (2, True), (3, False)])
    def test_the_share_is_of_all_rows(self, broken: int, passes: bool) -> None:
        rows: list[dict[str, Any]] = [{"prompt": "p", "path1": "a", "path2": "b"} for _ in range(10)]
        for index in range(broken):
            rows[3 * index]["path2"] = None
        dataset = datasets.Dataset.from_list(rows)
        if passes:
            reader = read_preferences(dataset, max_broken=0.2)
            assert (len(reader), reader.report.count) == (10 - broken, broken)
        else:
            with pytest.raises(ValueError, match="3 of 10 rows are broken(.|\n)*row 0: path2 is missing(.|\n)*row 6"):
                read_preferences(dataset, max_broken=0.2)

    def test_a_warning_says_what_was_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        rows = [{"prompt": "p", "path1": "a", "path2": None if index < 12 else "b"} for index in range(40)]
        with caplog.at_level(logging.WARNING):
            reader = read_preferences(datasets.Dataset.from_list(rows), max_broken=0.5)
        assert "12 of 40 rows are broken\n  row 0: path2 is missing" in caplog.text
        assert "... and 2 more" in caplog.text
        assert len(reader.report.first) == 10

    @pytest.mark.parametrize("option", ["max_broken", "min_confidence"])
    def test_shares_lie_between_0_and_1(self, option: str) -> None:
        with pytest.raises(ValueError, match=rf"{option} must lie in \[0, 1\], got 95"):
            read_preferences(pairs_of(2), **{option: 95})  # type: ignore[arg-type]


class TestSchemas:
    def test_unknown_columns_list_the_candidates(self) -> None:
        dataset = datasets.Dataset.from_dict({"prompt": ["p"], "path1": ["a"], "path3": ["b"]})
        with pytest.raises(ValueError, match=r"fit no schema.*Candidates:\n  hpdv3: lacks \['path2'\]\n") as error:
            read_preferences(dataset)
        assert all(name in str(error.value) for name in SCHEMAS)

    def test_ambiguous_columns(self) -> None:
        dataset = datasets.Dataset.from_list([dict.fromkeys(("prompt", "path1", "path2", "chosen", "rejected"), "x")])
        with pytest.raises(ValueError, match=r"fit the schemas \['hpdv3', 'trl'\]; pass schema=NAME"):
            read_preferences(dataset)
        assert read_preferences(dataset, schema="trl").schema == "trl"

    def test_missing_column_of_a_named_schema(self) -> None:
        with pytest.raises(ValueError, match=r"lacks the columns \['chosen', 'rejected'\] of the schema 'trl'"):
            read_preferences(pairs_of(1), schema="trl")
        with pytest.raises(ValueError, match="unknown schema 'hpd'; expected one of"):
            read_preferences(pairs_of(1), schema="hpd")

    def test_a_filter_that_cannot_work_is_refused(self) -> None:
        with pytest.raises(ValueError, match="says nothing about the annotators' confidence"):
            read_preferences(pairs_of(2), min_confidence=0.9)
        with pytest.raises(ValueError, match="schema 'hpdv3' has the dimensions"):
            read_preferences(pairs_of(2), dimension="VQ")

    def test_nothing_left(self) -> None:
        rows = [{"prompt": "p", "path1": "a", "path2": "b", "confidence": 0.5}]
        with pytest.raises(ValueError, match=r"no pair left:\n0 of 1 rows are broken\n.*1 \(confidence below 0.9\)"):
            read_preferences(datasets.Dataset.from_list(rows), min_confidence=0.9)
        with pytest.raises(ValueError, match="the dataset has no rows"):
            read_preferences(pairs_of(1).select([]))


class TestMapStyle:
    @pytest.fixture
    def reader(self, tmp_path: Path) -> PreferenceReader:
        for name in range(8):
            write_image(tmp_path / f"{name}.png", name)
        rows = {
            "prompt": [f"p{i}" for i in range(4)],
            "path1": [f"{2 * i}.png" for i in range(4)],
            "path2": [f"{2 * i + 1}.png" for i in range(4)],
        }
        return read_preferences(datasets.Dataset.from_dict(rows).select([3, 0, 2]), image_root=tmp_path)

    def test_selected_rows_of_a_dataset(self, reader: PreferenceReader) -> None:
        assert [pair.prompt for pair in all_pairs(reader)] == ["p3", "p0", "p2"]
        assert [
            first_preferred(pair, expected) for pair, expected in zip(all_pairs(reader), (6, 0, 4), strict=True)
        ] == [1] * 3
        assert reader[-1].prompt == "p2"
        for index in (3, -4):
            with pytest.raises(IndexError):
                reader[index]

    def test_labels_equal_the_records(self, reader: PreferenceReader) -> None:
        assert reader.labels.p_a.dtype == reader.labels.weight.dtype == np.float32
        assert reader.labels.p_a.tolist() == [pair.p_a for pair in all_pairs(reader)]

    def test_worker_processes(self, reader: PreferenceReader) -> None:
        copy = pickle.loads(pickle.dumps(reader))
        assert [number(pair.a) for pair in all_pairs(copy)] == [number(pair.a) for pair in all_pairs(reader)]
        loader = torch.utils.data.DataLoader(reader, batch_size=None, num_workers=1)
        assert [pair.prompt for pair in loader] == ["p3", "p0", "p2"]


def test_further_columns_are_handed_on_whichever_side_comes_first() -> None:
    rows = pairs_of(12).add_column("category", ["food", "null", None] * 4).add_column("votes", list(range(12)))
    reader = read_preferences(rows, columns=("category", "votes"))
    assert 0 < int(shown_first(reader).sum()) < 12
    table = [reader._further(reader._sides(index)[1][0]) for index in range(12)]
    assert table == [{"category": "food" if i % 3 == 0 else None, "votes": i} for i in range(12)]
    with pytest.raises(ValueError, match=r"has no column \['kind'\]; it has category, path1, path2, prompt, votes"):
        read_preferences(rows, columns=("kind",))
