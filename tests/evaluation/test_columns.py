from __future__ import annotations

import numpy as np
import pytest
import torch

from dina_reward.evaluation.columns import plain_columns, select_columns, text_of


def test_what_rows_can_be_grouped_by() -> None:
    record = {
        "prompt": "a cat",
        "chosen": torch.zeros(2, 4, 4),
        "gap": torch.tensor(0.5),
        "votes": np.int64(3),
        "size": (832, 1248),
        "sure": True,
        "category": None,
        "more": {"nested": 1},
    }
    assert plain_columns(record) == {
        "prompt": "a cat", "gap": 0.5, "votes": 3, "size": "832x1248", "sure": True, "category": None
    }  # fmt: skip


def test_a_missing_column_is_named_with_those_there_are() -> None:
    columns = {"source": ["x"], "category": ["y"]}
    assert select_columns("category", columns) == {"category": ["y"]}
    assert list(select_columns(("source", "category", "source"), columns)) == ["source", "category"]
    with pytest.raises(ValueError, match="has no column 'kind', 'sort'; it has category, source"):
        select_columns(("kind", "source", "sort"), columns)


def test_text() -> None:
    assert [text_of(value) for value in (None, "x", 2, np.array([4, 8]), (1, 2))] == ["", "x", "2", "4x8", "1x2"]
