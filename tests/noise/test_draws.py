"""Noise draws: reproducible, independent of the batch, explicit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dina_reward.noise.draws import draw_level_noise, draw_noise, fold_seed


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


@pytest.mark.parametrize("seed", [np.int64(5), np.array(5), torch.tensor(5), torch.tensor(5, dtype=torch.uint8)])
def test_seeds_are_integers_of_any_kind(seed: Any) -> None:
    assert torch.equal(draw_noise(LATENTS, seed=seed), draw_noise(LATENTS, seed=5))
    assert torch.equal(draw_noise(LATENTS, seed=seed, share_noise=True), draw_noise(LATENTS, seed=5, share_noise=True))
    assert torch.equal(draw_noise(LATENTS, seed=4 * [seed]), draw_noise(LATENTS, seed=[5, 5, 5, 5]))


@pytest.mark.parametrize(
    "seed", [1.5, "12", True, {1, 2, 3, 4}, torch.tensor([1.5, 2.5, 3.5, 4.5]), [1, 2, 3, 4.0], np.array([1.0] * 4)]
)
def test_what_is_no_integer_is_no_seed(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed"):
        draw_noise(LATENTS, seed=seed)


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
    noise = draw_noise(LATENTS, noise=row)
    assert noise.shape == (1, 4, 2, 3, 3)
    assert torch.equal(noise[0, 3], row[0])
    for single in (row, row[None]):
        with pytest.raises(ValueError, match="num_noise_samples=2, but the given noise has one draw"):
            draw_noise(LATENTS, num_samples=2, noise=single)
    whole = torch.randn(2, 4, 2, 3, 3)
    assert torch.equal(draw_noise(LATENTS, num_samples=2, noise=whole), whole)


def test_levels_have_noise_of_their_own_that_depends_on_row_and_level_alone() -> None:
    noise = draw_level_noise(LATENTS, (0.2, 0.5), num_samples=3, seed=7)
    assert noise.shape == (2, 3, 4, 2, 3, 3)
    assert len({tuple(row.tolist()) for row in noise.reshape(24, -1)}) == 24
    assert torch.equal(draw_level_noise(LATENTS, (0.5, 0.9), num_samples=2, seed=7)[0], noise[1, :2])
    assert torch.equal(draw_level_noise(LATENTS[:2], (0.2, 0.5), num_samples=3, seed=7), noise[:, :, :2])
    whole = draw_level_noise(LATENTS, (0.2, 0.5), seed=[1, 2, 3, 4])
    assert torch.equal(draw_level_noise(LATENTS[2:3], (0.2, 0.5), seed=torch.tensor([3])), whole[:, :, 2:3])
    correlation = torch.corrcoef(draw_level_noise(torch.zeros(1, 20_000), (0.2, 0.5), seed=0).reshape(2, -1))[0, 1]
    assert abs(float(correlation)) < 0.03


def test_noise_by_level_is_shared_or_given() -> None:
    shared = draw_level_noise(LATENTS, (0.2, 0.5), share_noise=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shared[:, :, :1].expand_as(shared), shared)
    assert not torch.equal(shared[0], shared[1])
    given = torch.randn(2, 3, *LATENTS.shape)
    assert torch.equal(draw_level_noise(LATENTS, (0.2, 0.5), num_samples=3, noise=given), given)
    for wrong in (given[0], given[:1]):
        with pytest.raises(ValueError, match=r"expected \(2, 3, 4, 2, 3, 3\): levels, draws"):
            draw_level_noise(LATENTS, (0.2, 0.5), num_samples=3, noise=wrong)


def test_fold_seed_separates_streams() -> None:
    assert fold_seed(0, 1) != fold_seed(1, 0)
    assert fold_seed(3) != fold_seed(3, 0)
    assert 0 <= fold_seed(-1, 2**63) < 2**63
    assert fold_seed(-1, 5) == fold_seed(2**64 - 1, 5)  # as `torch.manual_seed` reads them
    assert fold_seed(0, 1) == 7006255215521402662  # what was drawn once is drawn again
    assert fold_seed(7, 2, -1) == 8979722290671739915


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": 0, "noise": LATENTS}, "only one of"),
        ({"seed": [1, 2]}, "got 2 seeds for 4 latents"),
        ({"seed": [1, 2, 3, 4], "share_noise": True}, "single integer seed"),
        ({"noise": torch.zeros(3, 2, 3, 3)}, r"noise has shape \(1, 3, 2, 3, 3\)|noise has shape"),
        ({"noise": torch.zeros(4, 2, 3)}, "noise has shape"),
        ({"num_samples": 0}, "at least 1"),
        ({"num_samples": 1.5}, "an integer of at least 1 and at most 65536, got 1.5"),
        ({"generator": 1}, "must be a torch.Generator, got int"),
        ({"noise": LATENTS, "share_noise": True}, "share_noise=True has no effect on `noise`"),
        ({"noise": LATENTS.bool()}, "noise must be real numbers, got torch.bool"),
        ({"noise": LATENTS + torch.inf}, "NaN or infinite"),
    ],
)
def test_bad_noise_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_noise(LATENTS, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "seed", [1.5, "12", {1, 2, 3, 4}, {0: 1}, True, [1.0, 2, 3, 4], torch.tensor(1.5), 2**64, b"ab"]
)
def test_seeds_of_levels_are_checked_like_others(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed"):
        draw_noise(LATENTS, seed=seed)
    with pytest.raises(ValueError, match="seed"):
        draw_level_noise(LATENTS, (0.2, 0.5), seed=seed)


@pytest.mark.parametrize("seed", [np.int64(7), np.array(7), torch.tensor(7)])
def test_levels_take_integers_of_any_kind(seed: Any) -> None:
    assert torch.equal(draw_level_noise(LATENTS, (0.2,), seed=seed), draw_level_noise(LATENTS, (0.2,), seed=7))


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple])
def test_seeds_by_row_may_be_arrays(kind: Any) -> None:
    seeds = list(range(5, 5 + len(LATENTS)))
    assert torch.equal(draw_noise(LATENTS, seed=kind(seeds)), draw_noise(LATENTS, seed=seeds))
    assert torch.equal(
        draw_level_noise(LATENTS, (0.2,), seed=kind(seeds)), draw_level_noise(LATENTS, (0.2,), seed=seeds)
    )


def test_seeds_have_64_bits() -> None:
    for seed in (-(2**63), 2**64 - 1):
        assert draw_noise(LATENTS, seed=seed).shape == (1, *LATENTS.shape)
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(ValueError, match=f"seeds have 64 bits, got {seed}"):
            draw_noise(LATENTS, seed=seed)


def test_given_noise_is_spread_over_draws_and_rows_alone() -> None:
    with pytest.raises(ValueError, match="noise has shape"):
        draw_noise(LATENTS, noise=torch.zeros(len(LATENTS), 1, *LATENTS.shape[2:]))


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (LATENTS.numpy(), "latents must be a torch.Tensor, got ndarray"),
        (LATENTS.bool(), "latents must be real numbers, got torch.bool"),
        (LATENTS.int(), "latents must be floating-point numbers, got torch.int32"),
        (LATENTS.to_sparse(), "latents must be dense"),
        (torch.tensor(1.0), "latents must have a batch dimension"),
    ],
)
def test_latents_of_another_kind_are_refused(latents: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_noise(latents, seed=0)
