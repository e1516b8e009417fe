from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dina_reward import LatentReward
from dina_reward.evaluation import (
    PairProtocol,
    calibrate_variance,
    fit_variance,
    measure_calibration,
    score_pairs,
    variance,
)
from dina_reward.likelihood import ThurstoneModel
from tests.training.tiny_reward import separable_pairs, tiny_reward


LEVELS = (0.0, 0.3, 0.6, 0.9)


def scored_pairs(truth: ThurstoneModel, pairs: int = 4000) -> tuple[Tensor, Tensor]:
    """Margins at every level, and the labels: the preference that all levels are equally far from."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(pairs, generator=generator)
    margins = torch.stack([z * (2 * truth.variance(torch.tensor(level))).sqrt() for level in LEVELS], dim=1)
    return margins, torch.special.ndtr(z)


@pytest.mark.parametrize("truth", [ThurstoneModel(2.0, 0.05), ThurstoneModel(4.2, 0.3), ThurstoneModel(0.4, 1.5)])
def test_the_true_variance_is_found(truth: ThurstoneModel) -> None:
    margins, labels = scored_pairs(truth)
    found = fit_variance(margins, LEVELS, labels)
    assert found.variance_scale == pytest.approx(truth.variance_scale, rel=0.01)
    assert found.variance_offset == pytest.approx(truth.variance_offset, rel=0.01)


def test_single_votes_give_the_same_up_to_their_noise() -> None:
    truth = ThurstoneModel(3.0, 0.2)
    margins, labels = scored_pairs(truth, 40_000)
    votes = torch.bernoulli(labels, generator=torch.Generator().manual_seed(1))
    found = fit_variance(margins, LEVELS, votes)
    assert found.variance_scale == pytest.approx(3.0, rel=0.05)
    assert found.variance_offset == pytest.approx(0.2, rel=0.05)


def test_overconfident_scores_become_calibrated_at_every_level() -> None:
    margins, labels = scored_pairs(ThurstoneModel(5.0, 0.4))
    errors = {}
    for name, model in (("before", ThurstoneModel()), ("after", fit_variance(margins, LEVELS, labels))):
        errors[name] = [
            measure_calibration(
                model.probability(column, torch.zeros_like(column), torch.tensor(level)), labels
            ).expected_calibration_error
            for column, level in zip(margins.T, LEVELS, strict=True)
        ]
    assert min(errors["before"]) > 0.07
    assert max(errors["after"]) < 0.005


def test_a_reward_takes_the_fit_over_and_keeps_it(tmp_path: Any, sd3_pipeline: Any) -> None:
    reward, pairs = tiny_reward(pipeline=sd3_pipeline).eval(), separable_pairs(32)
    before = reward(pairs.chosen[:4], "a red circle", seed=0)
    margins = score_pairs(reward, pairs, PairProtocol((0.3,), None), progress=False).margins[:, 0]
    labels = torch.special.ndtr(margins / margins.std())
    rows = [{**pairs[index], "p_chosen": float(label)} for index, label in enumerate(labels)]
    fitted = calibrate_variance(reward, rows, noise_levels=(0.2, 0.4), progress=False)
    at_half_way = 2 * fitted.variance(torch.tensor(0.3))
    assert float(at_half_way) == pytest.approx(float(margins.var()), rel=0.2)
    assert reward.preference_model == fitted
    reward.save_pretrained(tmp_path / "reward")
    loaded = LatentReward.from_pretrained(tmp_path / "reward", pipeline=sd3_pipeline)
    assert loaded.preference_model == fitted
    torch.testing.assert_close(loaded(pairs.chosen[:4], "a red circle", seed=0), before)


@pytest.mark.parametrize(
    ("sign", "message"), [(1.0, "order every pair as its label does"), (-1.0, "say nothing about")]
)
def test_there_may_be_no_best_variance(sign: float, message: str) -> None:
    margins, _ = scored_pairs(ThurstoneModel(), 200)
    with pytest.raises(ValueError, match=message):
        fit_variance(margins, LEVELS, (sign * margins[:, 0] > 0).float())


@pytest.mark.parametrize("share", [9_000.0, 1.1e-4])
def test_a_variance_within_four_orders_of_the_squared_scores_is_fitted(share: float) -> None:
    margins, labels = alike_at_all_levels(share)
    fitted = fit_variance(margins, LEVELS, labels)
    assert fitted.variance(torch.tensor(LEVELS)).mean().item() == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize(("share", "message"), [(1.1e4, "say nothing about"), (0.9e-4, "order every pair as its")])
def test_a_variance_further_off_is_refused(share: float, message: str) -> None:
    margins, labels = alike_at_all_levels(share)
    with pytest.raises(ValueError, match=message):
        fit_variance(margins, LEVELS, labels)


def alike_at_all_levels(share: float) -> tuple[Tensor, Tensor]:
    """Margins of mean square one, and labels by a variance of ``share``."""
    margins = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    margins /= margins.square().mean().sqrt()
    return margins[:, None].expand(-1, len(LEVELS)), torch.special.ndtr(margins / (2 * share) ** 0.5)


@pytest.mark.parametrize(
    ("shape", "levels", "message"),
    [
        ((3, 2), (0.1, 0.2, 0.3), r"margins have shape \(3, 2\); expected \(3, 3\)"),
        ((0, 2), (0.1, 0.2), "at least one pair"),
        ((3, 1), (0.1,), "two noise levels or more"),
        ((3, 2), (0.1, 0.1), "two noise levels or more"),
    ],
)
def test_bad_input_is_refused(shape: tuple[int, int], levels: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_variance(torch.ones(shape), levels, torch.ones(shape[0]))


def test_other_likelihoods_have_no_variance(sd3_pipeline: Any) -> None:
    from tests.training.test_neighbours import neighbour

    with pytest.raises(ValueError, match="'bradley_terry', which has no variance"):
        calibrate_variance(neighbour(sd3_pipeline, "pooled"), separable_pairs(2))


def test_levels_are_tenths_below_one() -> None:
    assert pytest.approx([level / 10 for level in range(10)]) == variance.LEVELS
