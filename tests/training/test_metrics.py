from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator

from dina_reward.training.metrics import PairMetrics


def test_means_over_micro_batches() -> None:
    metrics = PairMetrics()
    metrics.update(
        margin=torch.tensor([2.0, -1.0, 0.0]),
        loss=torch.tensor([0.1, 0.9, 0.4]),
        level=torch.tensor([0.1, 0.5, 0.9]),
        p_chosen=torch.ones(3),
    )
    metrics.update(
        margin=torch.tensor([-3.0, 5.0]),
        loss=torch.tensor([0.3, 0.7]),
        level=torch.tensor([0.2, 1.0]),
        p_chosen=torch.tensor([0.2, 0.5]),  # the other side is preferred; a tie
    )
    values = metrics.pop(Accelerator(cpu=True))
    assert values == pytest.approx(
        {
            "accuracy": (1 + 0 + 0.5 + 1) / 4,
            "margin": (2 - 1 + 0 + 3) / 4,
            "accuracy/low_noise": (1 + 1) / 2,
            "accuracy/mid_noise": 0.0,
            "accuracy/high_noise": 0.5,  # the tie at level 1 does not count
            "loss/low_noise": 0.2,
            "loss/mid_noise": 0.9,
            "loss/high_noise": 0.55,
        }
    )
    assert metrics.pop(Accelerator(cpu=True)) == {}
