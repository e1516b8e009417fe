"""Noise draws: reproducible, independent of the batch, explicit."""

from __future__ import annotations

import pytest
import torch

from dina_reward.noise.draws import draw_noise, fold_seed


LATENTS = torch.zeros(4, 2, 3, 3)


def test_seed_gives_every_row_its_own_stream() -> None:
    noise = draw_noise(LATENTS, num_samples=2, seed=7)
    assert noise.shape == (2, 4, 2, 3, 3)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise, draw_noise(LATENTS, num_samples=2, seed=7), rtol=0, atol=0)
    torch.testing.assert_close(noise[:, :2], draw_noise(LATENTS[:2], num_samples=2, seed=7), rtol=0, atol=0)
    flat = noise.reshape(8, -1)
    assert len({tuple(row.tolist()) for row in flat}) == 8
    assert not torch.equal(noise, draw_noise(LATENTS, num_samples=2, seed=8))


def test_row_seeds_follow_their_row_into_any_batch() -> None:
    seeds = [11, 12, 13, 14]
    whole = draw_noise(LATENTS, seed=seeds)
    for row in range(4):
        part = draw_noise(LATENTS[row : row + 1], seed=torch.tensor(seeds[row : row + 1]))
        torch.testing.assert_close(part[:, 0], whole[:, row], rtol=0, atol=0)


def test_more_samples_extend_the_stream() -> None:
    torch.testing.assert_close(draw_noise(LATENTS, num_samples=3, seed=0)[:1], draw_noise(LATENTS, seed=0))


def test_shared_noise_is_one_draw() -> None:
    for source in ({"seed": 3}, {"generator": torch.Generator().manual_seed(3)}, {}):
        noise = draw_noise(LATENTS, share_noise=True, **source)  # type: ignore[arg-type]
        assert torch.equal(noise[:, :1].expand_as(noise), noise)


def test_generator_advances_and_global_state_is_used_last() -> None:
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(draw_noise(LATENTS, generator=generator), draw_noise(LATENTS, generator=generator))
    torch.manual_seed(5)
    first = draw_noise(LATENTS)
    torch.manual_seed(5)
    assert torch.equal(first, draw_noise(LATENTS))


def test_draws_are_standard_normal() -> None:
    noise = draw_noise(torch.zeros(64, 16, 16, 16), seed=0)
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01


def test_given_noise_is_broadcast() -> None:
    row = torch.randn(1, 2, 3, 3)
    noise = draw_noise(LATENTS, num_samples=2, noise=row)
    assert noise.shape == (2, 4, 2, 3, 3)
    assert torch.equal(noise[1, 3], row[0])
    whole = torch.randn(2, 4, 2, 3, 3)
    assert torch.equal(draw_noise(LATENTS, num_samples=2, noise=whole), whole)


def test_fold_seed_separates_streams() -> None:
    assert fold_seed(0, 1) != fold_seed(1, 0)
    assert fold_seed(3) != fold_seed(3, 0)
    assert 0 <= fold_seed(-1, 2**63) < 2**63


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 0, "noise": LATENTS}, "only one of"),
        ({"seed": [1, 2]}, "got 2 seeds for 4 latents"),
        ({"seed": [1, 2, 3, 4], "share_noise": True}, "single integer seed"),
        ({"noise": torch.zeros(3, 2, 3, 3)}, r"noise has shape \(1, 3, 2, 3, 3\)|noise has shape"),
        ({"noise": torch.zeros(4, 2, 3)}, "noise has shape"),
        ({"num_samples": 0}, "at least 1"),
    ],
)
def test_bad_noise_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_noise(LATENTS, **arguments)  # type: ignore[arg-type]
