"""Distance between the members of a group."""

import math

import pytest
import torch

from dina_reward.alignment.experience.diversity import diversity


def test_diversity_of_noise_is_one():
    noise = torch.randn(12, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert diversity(noise, [0] * 6 + [1] * 6) == pytest.approx(1, abs=0.01)
    assert diversity(3 * noise, torch.arange(12) // 3) == pytest.approx(3, abs=0.03)


def test_diversity_is_the_mean_pairwise_distance():
    latents = torch.tensor([0.0, 3.0, 4.0, 7.0, 7.0, 100.0])[:, None, None].expand(6, 2, 8)
    # Distances 3, 1 and 4 in the first group, 0 in the second; the last has no pair.
    expected = ((3 + 1 + 4) / 3 + 0) / 2 / math.sqrt(2)
    assert diversity(latents, [5, 5, 5, 2, 2, 9]) == pytest.approx(expected)
    assert diversity(latents.bfloat16(), torch.tensor([5, 5, 5, 2, 2, 9])) == pytest.approx(expected, rel=1e-2)
    assert math.isnan(diversity(latents, range(6)))
    with pytest.raises(ValueError, match=r"group_index has shape \(2,\) for 6 latents"):
        diversity(latents, [0, 0])


def test_diversity_sees_small_differences():
    latents = 100 + 1e-4 * torch.arange(30.0)[:, None].expand(30, 64)
    assert diversity(latents, [0] * 30) == pytest.approx(1e-4 * 31 / 3 / math.sqrt(2), rel=0.05)
