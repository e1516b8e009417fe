from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dina_reward.noise import FlowMatchingNoise, LevelSampler
from dina_reward.training.pair_noise import PairNoiser


@pytest.fixture(scope="module")
def noiser() -> PairNoiser:
    process = FlowMatchingNoise.from_scheduler_config({"num_train_timesteps": 1000, "shift": 3.0})
    return PairNoiser(process, LevelSampler(), seed=0)


@pytest.fixture(scope="module")
def sides() -> tuple[Tensor, Tensor]:
    chosen, rejected = torch.randn(2, 8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    return chosen, rejected


def test_both_sides_see_the_same_noise_at_the_same_level(noiser: PairNoiser, sides: tuple[Tensor, Tensor]) -> None:
    pairs = noiser(*sides, step=3, first_position=0)
    level = pairs.point.level[:, None, None, None]
    for clean, noisy in zip(sides, pairs.latents.chunk(2), strict=True):
        torch.testing.assert_close(noisy, (1 - level) * clean + level * pairs.noise)
    torch.testing.assert_close(pairs.point.timestep, 1000 * pairs.point.level)
    assert all(bool((noiser.process.levels == value).any()) for value in pairs.point.level)


def test_each_side_may_have_noise_of_its_own(noiser: PairNoiser, sides: tuple[Tensor, Tensor]) -> None:
    shared = noiser(*sides, step=3, first_position=0)
    own = replace(noiser, share_noise=False)(*sides, step=3, first_position=0)
    assert shared.rejected_noise is shared.noise
    assert torch.equal(own.noise, shared.noise)
    assert torch.equal(own.point.level, shared.point.level)
    level = own.point.level[:, None, None, None]
    torch.testing.assert_close(own.latents[8:], (1 - level) * sides[1] + level * own.rejected_noise)
    correlation = torch.corrcoef(torch.stack([own.noise.flatten(), own.rejected_noise.flatten()]))[0, 1]
    assert abs(correlation) < 0.1


def test_pairs_draw_independently(noiser: PairNoiser, sides: tuple[Tensor, Tensor]) -> None:
    pairs = noiser(*sides, step=0, first_position=0)
    assert len(pairs.point.level.unique()) == 8
    correlation = torch.corrcoef(pairs.noise.flatten(1)) - torch.eye(8)
    assert correlation.abs().max() < 0.35


def test_draws_depend_on_position_and_not_on_the_split(noiser: PairNoiser, sides: tuple[Tensor, Tensor]) -> None:
    whole = noiser(*sides, step=5, first_position=0)
    second_half = noiser(sides[0][4:], sides[1][4:], step=5, first_position=4)
    assert torch.equal(whole.noise[4:], second_half.noise)
    assert torch.equal(whole.point.level[4:], second_half.point.level)


def test_steps_and_seeds_draw_differently(noiser: PairNoiser, sides: tuple[Tensor, Tensor]) -> None:
    first = noiser(*sides, step=0, first_position=0)
    other_seed = PairNoiser(noiser.process, noiser.levels, seed=1)(*sides, step=0, first_position=0)
    for other in (noiser(*sides, step=1, first_position=0), other_seed):
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.point.level, other.point.level)


def test_levels_follow_the_distribution(noiser: PairNoiser) -> None:
    clean = torch.zeros(2000, 1, 1)
    levels = noiser(clean, clean, step=0, first_position=0).point.level
    assert levels.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.quantile(levels, 0.25).item() == pytest.approx(0.25, abs=0.03)


def test_half_precision_latents_are_noised_in_float32(noiser: PairNoiser) -> None:
    half = torch.zeros(2, 4, 6, 6, dtype=torch.bfloat16)
    assert noiser(half, half, step=0, first_position=0).latents.dtype == torch.float32
