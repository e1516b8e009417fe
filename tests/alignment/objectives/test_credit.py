from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dina_reward.alignment.objectives.credit import gains_to_go


def test_gains_by_hand():
    scores, final = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([6.0])
    assert gains_to_go(scores, final, 0.0).tolist() == [[2.0, -1.0, 4.0]]
    assert gains_to_go(scores, final, 1.0).tolist() == [[5.0, 3.0, 4.0]]
    assert gains_to_go(scores, final, 0.5).tolist() == [[2.5, 1.0, 4.0]]


@given(st.integers(1, 5), st.integers(0, 100))
def test_undiscounted_gains_telescope(states, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, final = torch.randn((4, states), generator=generator), torch.randn(4, generator=generator)
    torch.testing.assert_close(gains_to_go(scores, final, 1.0), final[:, None] - scores)
