"""Columns of every type that files come with."""

from __future__ import annotations

import datasets
import pyarrow as pa

from dina_reward.data.columns import Columns
from dina_reward.data.sides import stored_value


def test_lists_of_views_are_lists_of_text() -> None:
    names = pa.array([["a", "b"], None], pa.list_(pa.string_view()))
    columns = Columns(datasets.Dataset(pa.table({"names": names})))
    assert columns.lists("names", of_numbers=False, optional=True).to_pylist() == [["a", "b"], None]
    assert stored_value(pa.array(['["a", "b"]'], pa.string_view()), 0, 1) == "b"
