from __future__ import annotations

import pytest
import torch

from dina_reward.distill import DriftSettings
from dina_reward.distill.drift import DriftSnapshot, drift_reasons, snapshot
from tests.training.tiny_reward import LATENT_SHAPE, tiny_reward


REFERENCE = DriftSnapshot(torch.zeros(4), torch.full((4,), 2.0), 0.5)


def test_distance_is_in_deviations_of_the_reference():
    moved = DriftSnapshot(torch.tensor([2.0, -2.0, 2.0, 2.0]), torch.ones(4), 0.5)
    assert moved.distance(REFERENCE) == pytest.approx(1.0, abs=1e-5)
    assert REFERENCE.distance(REFERENCE) == 0


def test_reasons_name_what_is_beyond_its_limit():
    far = DriftSnapshot(torch.full((4,), 4.0), torch.ones(4), 2.0)
    assert drift_reasons(DriftSettings(), REFERENCE, REFERENCE) == []
    assert drift_reasons(DriftSettings(), far, REFERENCE) == [
        "features moved by 2.00 deviations",
        "spread over noise levels grew 4.00 times",
    ]
    assert drift_reasons(DriftSettings(max_distance=None, max_spread=5.0), far, REFERENCE) == []
    with pytest.raises(ValueError, match="samples must lie in"):
        DriftSettings(samples=1)


def test_snapshots_see_other_samples(sd3_pipeline):
    reward = tiny_reward(pipeline=sd3_pipeline).eval()
    latents = torch.randn(8, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    prompts, seeds = ["a cat"] * 8, list(range(8))
    first = snapshot(reward, latents, prompts, seeds, batch_size=3)
    again = snapshot(reward, latents, prompts, seeds, batch_size=8)
    torch.testing.assert_close(first.mean, again.mean, atol=1e-5, rtol=1e-4)
    assert first.spread == pytest.approx(again.spread, rel=1e-4)
    brighter = snapshot(reward, latents + 1.5, prompts, seeds, batch_size=8)
    assert brighter.distance(first) > 20 * again.distance(first)
    back = DriftSnapshot.from_tensors(first.tensors())
    assert back.distance(first) == 0
