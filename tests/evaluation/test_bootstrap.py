from __future__ import annotations

import numpy as np
import pytest

from dina_reward.evaluation import bootstrap as module
from dina_reward.evaluation.bootstrap import ClusterBootstrap


def test_interval_of_independent_pairs_is_the_binomial_one() -> None:
    credit = np.array([1.0] * 300 + [0.0] * 100)
    bootstrap = ClusterBootstrap(range(400), resamples=4000, seed=0)
    ((low, high),) = bootstrap.interval(bootstrap.means(credit))
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - error, 0.75 + error), abs=0.004)


def test_pairs_of_one_prompt_stay_together() -> None:
    # Ten equal pairs per prompt carry no more information than one: the interval is sqrt(10) times as wide.
    credit = np.repeat(np.array([1.0] * 30 + [0.0] * 10), 10)
    together = ClusterBootstrap(np.repeat(np.arange(40), 10).tolist(), resamples=2000, seed=0)
    apart = ClusterBootstrap(range(400), resamples=2000, seed=0)
    widths = [float(np.diff(b.interval(b.means(credit))[0])[0]) for b in (together, apart)]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(10), rel=0.1)


def test_two_clusters_by_hand() -> None:
    # Two clusters with means 1 (one pair) and 0 (three pairs): a resample is 1, 1/4 or 0.
    bootstrap = ClusterBootstrap(["x", "y", "y", "y"], resamples=400, seed=0)
    means = bootstrap.means(np.array([1.0, 0, 0, 0]))[:, 0]
    assert set(means.tolist()) == {0.0, 0.25, 1.0}
    assert np.mean(means == 0.25) == pytest.approx(0.5, abs=0.08)
    assert bootstrap.interval(means[:, None]).tolist() == [[0.0, 1.0]]


def test_missing_credit_weights_and_columns() -> None:
    values = np.array([[1.0, np.nan], [0.0, np.nan], [np.nan, 1.0]])
    bootstrap = ClusterBootstrap(["x", "x", "x"], resamples=3, seed=0)
    weights = np.array([[1.0, 1.0], [3.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(bootstrap.means(values), np.tile([0.5, 1.0], (3, 1)))
    np.testing.assert_allclose(bootstrap.means(values, weights), np.tile([0.25, 1.0], (3, 1)))
    assert np.isnan(bootstrap.interval(bootstrap.means(values))).all()


def test_seed_decides_and_blocks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    credit = np.random.default_rng(0).random(50)
    first = ClusterBootstrap(range(50), resamples=64, seed=3).means(credit)
    assert not np.array_equal(ClusterBootstrap(range(50), resamples=64, seed=4).means(credit), first)
    monkeypatch.setattr(module, "_CELLS_AT_ONCE", 500)
    np.testing.assert_allclose(ClusterBootstrap(range(50), resamples=64, seed=3).means(credit), first)


def test_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        rate = generator.beta(3, 1.5, size=60)
        credit = (generator.random((60, 5)) < rate[:, None]).astype(float).ravel()
        bootstrap = ClusterBootstrap(np.repeat(np.arange(60), 5).tolist(), resamples=300, seed=trial)
        ((low, high),) = bootstrap.interval(bootstrap.means(credit))
        covered += low <= 3 / 4.5 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="0 pairs and 10 resamples"):
        ClusterBootstrap([], resamples=10)
    with pytest.raises(ValueError, match="1 pairs and 0 resamples"):
        ClusterBootstrap(["x"], resamples=0)


def test_one_resample_is_enough() -> None:
    means = ClusterBootstrap(["a", "b"], resamples=1).means(np.array([1.0, 1.0]))
    np.testing.assert_array_equal(means, [[1.0]])
