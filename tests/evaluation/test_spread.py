from __future__ import annotations

import pytest
import torch

from dina_reward.evaluation import calibrate_spread, fit_spread
from tests.training.tiny_reward import separable_pairs, tiny_reward


def world(scale: float, count: int = 6000):
    """Margins whose errors have the deviation ``scale`` times their spread, on top of the likelihood's variance."""
    generator = torch.Generator().manual_seed(0)
    truth, spread = 2 * torch.randn(count, generator=generator), 2 * torch.rand(count, generator=generator)
    margin = truth + scale * spread * torch.randn(count, generator=generator)
    # A flat prior of the truth: P(truth > noise | margin).
    p = torch.special.ndtr(margin / (2 * 0.3 + scale**2 * spread**2).sqrt())
    return margin, spread, p


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_scale_of_a_spread_that_knows_is_found(scale):
    margin, spread, p = world(scale)
    fit = fit_spread(margin, spread, p, variance=0.3)
    assert fit.scale == pytest.approx(scale, rel=0.1)
    assert fit.gain > 0
    drawn = (torch.rand(len(p), generator=torch.Generator().manual_seed(1)) < p).float()
    found = fit_spread(margin, spread, drawn, variance=0.3)
    assert found.accuracy_sure > found.accuracy_unsure


def test_a_spread_that_knows_nothing_is_left_out():
    margin, spread, _ = world(2.0)
    p = torch.special.ndtr(margin / (2 * 0.3) ** 0.5)
    fit = fit_spread(margin, spread, p, variance=0.3)
    assert fit.scale < 0.1
    with pytest.raises(ValueError, match="of at least four pairs"):
        fit_spread(margin[:3], spread[:3], p[:3], 0.3)


def test_calibration_is_written_into_the_configuration(sd3_pipeline, tmp_path):
    reward = tiny_reward(pipeline=sd3_pipeline).eval()
    fit = calibrate_spread(reward, separable_pairs(8), num_noise_samples=2, batch_size=3)
    assert reward.config.spread_scale == float(f"{fit.scale:.3g}")
    assert reward.model.config is reward.config
    reward.save_pretrained(tmp_path)
    reward.load_weights(tmp_path)
