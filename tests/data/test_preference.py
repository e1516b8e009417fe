from __future__ import annotations

import pytest
import torch

from dina_reward.data import Preference, collate_preferences


def test_training_row() -> None:
    a, b = torch.zeros(2, 4, 4), torch.ones(2, 4, 4)
    pair = Preference("p", a, b, 0.25, weight=2, source="x / y", group="g", columns={"category": "food"})
    assert {name: pair.training_row()[name] for name in ("source", "group", "category")} == {
        "source": "x / y", "group": "g", "category": "food"
    }  # fmt: skip
    batch = collate_preferences([pair.training_row(), pair.training_row(chosen=b, rejected=a)])
    torch.testing.assert_close(batch["chosen"], torch.stack([a, b]))
    torch.testing.assert_close(batch["rejected"], torch.stack([b, a]))
    assert batch["p_chosen"].tolist() == [0.25, 0.25]
    assert batch["weight"].tolist() == [2, 2]


@pytest.mark.parametrize("values", [{"p_a": 1.1}, {"p_a": float("nan")}, {"weight": -1.0}, {"weight": float("inf")}])
def test_values_outside_their_range(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))} must .*prompt 'p'"):
        Preference("p", torch.zeros(1), torch.zeros(1), **{"p_a": 1.0, **values})
