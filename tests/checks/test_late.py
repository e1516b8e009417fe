from __future__ import annotations

import pytest
import torch

from dina_reward.checks.late import LateChecks
from tests.synchronisation import Synchronisations


def test_the_first_condition_that_does_not_hold_is_raised():
    late = LateChecks()
    late.add(torch.tensor([True, True]), lambda: ValueError("one"))
    late.add(torch.tensor([[True], [False]]), lambda: KeyError("two"))
    late.add(torch.tensor(False), lambda: ValueError("three"))
    with pytest.raises(KeyError, match="two"):
        late.settle()
    late.settle()  # they have been dealt with


def test_nothing_and_what_holds_are_silent():
    late = LateChecks()
    late.settle()
    late.add(torch.ones(3, dtype=torch.bool), lambda: ValueError("no"))
    late.settle()


def test_the_device_is_read_once_for_all():
    values = torch.randn(4)
    with Synchronisations([values]) as seen:
        late = LateChecks()
        for limit in range(5):
            late.add(values.abs() < 100 + limit, lambda: ValueError("no"))
        assert seen.count == 0
        late.settle()
    assert seen.count == 1


def test_graphs_are_not_kept():
    latents = torch.randn(3, requires_grad=True)
    late = LateChecks()
    late.add(latents * 2 < 100, lambda: ValueError("no"))
    late.settle()
