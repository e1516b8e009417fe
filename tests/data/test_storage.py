from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from dina_reward.data import LatentPreferenceDataset, collate_preferences, load_preferences, preference_rows


@pytest.fixture
def pairs() -> LatentPreferenceDataset:
    chosen, rejected = torch.randn(2, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    p_chosen = torch.tensor([1.0, 0.5, 0.8, 1.0, 0.0])
    return LatentPreferenceDataset([f"prompt {i} ü" for i in range(5)], chosen, rejected, p_chosen)


def as_lists(pairs: LatentPreferenceDataset) -> list[dict[str, Any]]:
    rows = (pairs[index] for index in range(len(pairs)))
    return [{**row, "chosen": row["chosen"].tolist(), "rejected": row["rejected"].tolist()} for row in rows]


def assert_same_rows(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    first, second = (collate_preferences([rows[index] for index in range(len(one))]) for rows in (one, other))
    assert first["prompts"] == second["prompts"]
    for name in ("chosen", "rejected", "p_chosen", "weight"):
        torch.testing.assert_close(first[name], second[name])  # type: ignore[literal-required]


def test_own_format_round_trip(tmp_path: Path, pairs: LatentPreferenceDataset) -> None:
    pairs.save(tmp_path / "pairs")
    assert_same_rows(load_preferences(tmp_path / "pairs"), pairs)


def test_saving_deletes_nothing_of_others(
    tmp_path: Path, pairs: LatentPreferenceDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "src").mkdir(parents=True)
    (tmp_path / "project" / "thesis.tex").write_text("x")
    monkeypatch.chdir(tmp_path / "project")
    for place in (tmp_path / "project", Path()):
        with pytest.raises(ValueError, match=r"thesis\.tex|in use"):
            pairs.save(place)
    pairs.save("pairs")
    (tmp_path / "project" / "pairs" / "prompts.json").unlink()
    pairs.save("pairs")
    (tmp_path / "project" / "pairs" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds other files too \(notes\.txt\)"):
        pairs.save("pairs")
    assert sorted(path.name for path in Path().iterdir()) == ["pairs", "src", "thesis.tex"]


def test_pairs_whose_replacement_was_killed_are_found(tmp_path: Path, pairs: LatentPreferenceDataset) -> None:
    pairs.save(tmp_path / ".pairs.previous")
    assert_same_rows(load_preferences(tmp_path / "pairs"), pairs)
    assert_same_rows(LatentPreferenceDataset.load(tmp_path / "pairs"), pairs)


def test_parquet(tmp_path: Path, pairs: LatentPreferenceDataset) -> None:
    rows = datasets.Dataset.from_list(as_lists(pairs))
    rows.to_parquet(str(tmp_path / "pairs.parquet"))
    assert_same_rows(load_preferences(tmp_path / "pairs.parquet"), pairs)
    assert isinstance(load_preferences(tmp_path / "pairs.parquet")[0]["chosen"], torch.Tensor)

    for index in range(2):
        rows.shard(2, index, contiguous=True).to_parquet(str(tmp_path / "sharded" / f"test-{index}.parquet"))
    assert_same_rows(load_preferences(tmp_path / "sharded", split="test"), pairs)
    with pytest.raises(ValueError, match="for the split 'validation'"):
        load_preferences(tmp_path / "sharded", split="validation")


def test_saved_dataset_and_dataset_dict(tmp_path: Path, pairs: LatentPreferenceDataset) -> None:
    rows = datasets.Dataset.from_list(as_lists(pairs))
    rows.save_to_disk(str(tmp_path / "one"))
    assert_same_rows(load_preferences(tmp_path / "one"), pairs)
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "several"))
    assert_same_rows(load_preferences(tmp_path / "several", split="test"), pairs)
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['test'\]"):
        load_preferences(tmp_path / "several")


def test_from_records(pairs: LatentPreferenceDataset) -> None:
    assert_same_rows(LatentPreferenceDataset.from_records(as_lists(pairs)), pairs)
    with pytest.raises(ValueError, match="no preference records"):
        LatentPreferenceDataset.from_records([])


def test_truncated_or_missing_files_are_refused(tmp_path: Path, pairs: LatentPreferenceDataset) -> None:
    directory = tmp_path / "pairs"
    pairs.save(directory)
    tensors = directory / "preferences.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-50])
    with pytest.raises(ValueError, match="are damaged"):
        load_preferences(directory)
    pairs.save(directory)
    (directory / "prompts.json").unlink()
    with pytest.raises(ValueError, match=r"prompts\.json is missing"):
        load_preferences(directory)


@pytest.mark.parametrize("text", ['"ab"', '{"a": 1}', "[1, 2, 3, 4, 5]", "[" * 10**6, "", "[NaN]"])
def test_saved_prompts_of_the_wrong_kind_are_refused(
    tmp_path: Path, pairs: LatentPreferenceDataset, text: str
) -> None:
    pairs.save(tmp_path / "pairs")
    (tmp_path / "pairs" / "prompts.json").write_text(text)
    with pytest.raises(ValueError, match=r"the preferences in .*pairs (are damaged|cannot be used)"):
        load_preferences(tmp_path / "pairs")


def test_places_without_preferences_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no preferences"):
        load_preferences(tmp_path)
    with pytest.raises(ValueError, match="neither a path here nor a dataset"):
        load_preferences(tmp_path / "nothing")


def test_rows_are_checked_once_in_front(pairs: LatentPreferenceDataset) -> None:
    assert preference_rows(pairs) is pairs
    with pytest.raises(ValueError, match="empty"):
        preference_rows([])
    with pytest.raises(ValueError, match="lack the columns"):
        preference_rows(datasets.Dataset.from_list([{"prompt": "x"}]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ["x"]}, "got 1 prompts"),
        ({"rejected": torch.zeros(2, 1, 3, 3)}, "equal shapes"),
        ({"p_chosen": torch.ones(3)}, r"p_chosen has shape \(3,\); expected \(2,\)"),
        ({"p_chosen": torch.tensor([5.0, 1])}, r"p_chosen must be finite numbers in \[0, 1\]"),
        ({"p_chosen": torch.tensor([float("nan"), 1])}, "p_chosen must be finite numbers"),
        ({"weight": torch.tensor([-1.0, 1])}, r"weight must be finite numbers in \[0, inf\]"),
        (
            {"chosen": torch.full((2, 1, 4, 4), float("nan"))},
            r"chosen holds NaN or infinite values in the pairs \[0, 1\]",
        ),
        ({"chosen": np.zeros((2, 1, 4, 4))}, "chosen must be a torch.Tensor, got ndarray"),
        ({"rejected": torch.zeros(2, 1, 4, 4).int()}, "rejected must be floating-point numbers, got torch.int32"),
        ({"prompts": "xy"}, "prompts must be a list of strings, one per pair, got str"),
        ({"prompts": {"x": 1, "y": 2}}, "got dict"),
        ({"prompts": ["x", 3]}, "prompts: each must be text, got int: 3"),
    ],
)
def test_lengths_must_agree(arguments: dict[str, Any], message: str) -> None:
    good = {"prompts": ["x", "y"], "chosen": torch.zeros(2, 1, 4, 4), "rejected": torch.zeros(2, 1, 4, 4)}
    with pytest.raises(ValueError, match=message):
        LatentPreferenceDataset(**{**good, **arguments})
