from __future__ import annotations

import math

import pytest
import torch

from dina_reward.evaluation import margin_variances


def test_parts_by_hand() -> None:
    # Level .2: pairs of margins (1, 3) and (-2, -2): noise (2 + 0) / 2, whole (1 + 9 + 4 + 4) / 4. Level .8: no noise.
    margins = torch.tensor([[[1.0, 3.0], [2.0, 2.0]], [[-2.0, -2.0], [1.0, 1.0]]])
    noisy, clean = margin_variances(margins, (0.2, 0.8))
    assert (noisy.noise_level, noisy.noise, noisy.between, noisy.noise_share) == (
        0.2,
        1.0,
        3.5,
        pytest.approx(1 / 4.5),
    )
    assert (clean.noise, clean.between, clean.noise_share) == (0.0, 2.5, 0.0)


def test_which_side_comes_first_does_not_matter_and_pure_noise_is_all_noise() -> None:
    margins = torch.tensor([[[1.0, 3.0]], [[-2.0, -2.0]]])
    assert margin_variances(margins, (0.2,)) == margin_variances(
        margins * torch.tensor([-1.0, 1.0])[:, None, None], (0.2,)
    )
    (pure,) = margin_variances(torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]]), (0.2,))
    assert (pure.noise, pure.between, pure.noise_share) == (2.0, 0.0, 1.0)
    (nothing,) = margin_variances(torch.zeros(3, 1, 2), (0.2,))
    assert math.isnan(nothing.noise_share)


@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 1), (3, 2, 4)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(pairs, 1, draws\)"):
        margin_variances(torch.zeros(shape), (0.2,))
