from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dina_reward.evaluation import (
    PairProtocol,
    PairScores,
    evaluate_preferences,
    plot_evaluation,
    report_from_scores,
    score_pairs,
)
from dina_reward.likelihood import BradleyTerryModel, ThurstoneModel, thurstone_preference
from dina_reward.reward import LatentReward
from tests.training.tiny_reward import separable_pairs, tiny_reward


PROTOCOL = PairProtocol(noise_levels=(0.1, 0.5), ensemble_levels=(0.2, 0.6))


@pytest.fixture(scope="module")
def reward(sd3_pipeline: Any) -> LatentReward:
    return tiny_reward(pipeline=sd3_pipeline).eval()


@pytest.fixture
def scores() -> PairScores:
    generator = torch.Generator().manual_seed(0)
    true_margin = 2 * torch.randn(400, generator=generator)
    labels = torch.bernoulli(thurstone_preference(true_margin, torch.tensor(0.1)), generator=generator)
    margins = torch.stack([true_margin, 0.5 * true_margin + torch.randn(400, generator=generator), true_margin], dim=1)
    return PairScores(margins, torch.zeros_like(margins), labels, PROTOCOL, ThurstoneModel())


def test_scores_agree_with_the_reward_and_share_noise(reward: LatentReward) -> None:
    pairs = separable_pairs(3)
    same = [{**pairs[index], "rejected": pairs[index]["chosen"]} for index in range(3)]
    scores = score_pairs(reward, same, PROTOCOL, progress=False)
    assert scores.chosen.shape == (3, 3)
    torch.testing.assert_close(scores.chosen, scores.rejected)


def test_batch_size_does_not_matter(reward: LatentReward) -> None:
    pairs = separable_pairs(5)
    first = score_pairs(reward, pairs, PROTOCOL, batch_size=2, progress=False)
    second = score_pairs(reward, (pairs[index] for index in range(5)), PROTOCOL, batch_size=5, progress=False)
    torch.testing.assert_close(first.margins, second.margins, atol=1e-5, rtol=1e-4)
    other_seed = PairProtocol(PROTOCOL.noise_levels, PROTOCOL.ensemble_levels, seed=1)
    assert not torch.allclose(score_pairs(reward, pairs, other_seed, progress=False).margins, first.margins)


def test_ensemble_uses_the_mean_variance_of_its_levels(scores: PairScores) -> None:
    expected = [2 * 0.01 + 0.05, 2 * 0.25 + 0.05, 2 * (0.04 + 0.36) / 2 + 0.05]
    torch.testing.assert_close(ThurstoneModel().variance(PROTOCOL.levels), torch.tensor(expected))
    torch.testing.assert_close(
        scores.probabilities[:, 2], thurstone_preference(scores.margins[:, 2], torch.tensor(expected[2]))
    )


def test_probabilities_are_those_of_the_rewards_likelihood(scores: PairScores) -> None:
    logistic = replace(scores, preference_model=BradleyTerryModel())
    torch.testing.assert_close(logistic.probabilities, torch.sigmoid(scores.margins))


def test_report_numbers_and_tables(scores: PairScores) -> None:
    report = report_from_scores(scores, num_bins=5)
    assert list(report.accuracy) == ["0.1", "0.5", "ensemble"]
    assert report.noise_levels == {"0.1": 0.1, "0.5": 0.5}
    assert report.best_level == "0.1"
    assert report.calibration["0.1"].expected_calibration_error < 0.05
    table = report.table()
    assert f"{100 * report.accuracy['0.5'].value:6.2f}" in table
    assert "tie convention 'half'" in table
    assert len(report.calibration_table("ensemble").splitlines()) == 6
    json.dumps(report.to_dict())


def test_picture_is_written(scores: PairScores, tmp_path: Path) -> None:
    plot_evaluation(report_from_scores(scores), tmp_path / "evaluation.png")
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000


def test_evaluates_from_records(reward: LatentReward, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate_preferences(reward, separable_pairs(6), PROTOCOL, ties="imagereward", batch_size=4)
    assert report.accuracy["ensemble"].pairs == 6
    assert report.accuracy["0.1"].convention == "imagereward"
    assert "scoring pairs" in capsys.readouterr().err


def test_single_level_without_ensemble(reward: LatentReward) -> None:
    report = evaluate_preferences(reward, separable_pairs(2), PairProtocol((0.4,), None), progress=False)
    assert list(report.accuracy) == ["0.4"]


def test_ensemble_alone(reward: LatentReward) -> None:
    report = evaluate_preferences(reward, separable_pairs(2), PairProtocol((), (0.2, 0.6)), progress=False)
    assert list(report.accuracy) == ["ensemble"]
    with pytest.raises(ValueError, match="no single noise level"):
        report.best_level  # noqa: B018


def test_bad_input_is_refused(reward: LatentReward, scores: PairScores) -> None:
    with pytest.raises(ValueError, match="no preference pairs"):
        score_pairs(reward, [], progress=False)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got 0"):
        score_pairs(reward, separable_pairs(1), batch_size=0, progress=False)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        PairProtocol((), None)
    with pytest.raises(ValueError, match="repeats a level"):
        PairProtocol((0.4, 0.4))
    with pytest.raises(ValueError, match=r"no setting '0.9'; this evaluation has 0.1, 0.5, ensemble"):
        scores.column("0.9")
    with pytest.raises(ValueError, match="no setting '0.9'"):
        report_from_scores(scores).calibration_table("0.9")


def test_report_by_columns(scores: PairScores) -> None:
    margins = torch.ones(300, 3)
    margins[:120, 1] = -1.0  # at level .5 all pairs of shape are wrong
    made = replace(
        scores,
        chosen=margins,
        rejected=torch.zeros(300, 3),
        p_chosen=torch.ones(300),
        prompts=["p"] * 150 + ["q"] * 150,
    )
    differs = ["shape"] * 120 + ["size"] * 130 + ["several"] * 50
    report = report_from_scores(made, by={"differs": differs}, resamples=100)
    shape = report.by["differs"]["0.5"]["shape"]
    assert (shape.accuracy.value, shape.accuracy.pairs, shape.mean_margin, shape.few) == (0.0, 120, -1.0, False)
    assert shape.calibration_error == pytest.approx(float(1 - made.probabilities[0, 1]))
    assert report.by["differs"]["0.1"]["shape"].accuracy.value == 1.0
    assert report.accuracy["0.5"].value == pytest.approx(0.6)
    assert report.accuracy["0.5"].interval == pytest.approx((0.2, 1.0))
    table = report.cells_table("differs", "0.5")
    assert "differs, 0.5: 60.0 % overall; worst: shape 0.0 % of 120 pairs" in table
    assert "| several | 50 (few) |   100.00 [100.00, 100.00] |       1.000 |" in table
    assert "few: fewer than 100 pairs" in table
    assert "100.0 % overall; worst: size 100.0 % of 130 pairs" in report.table()
    assert json.loads(json.dumps(report.to_dict()))["by"]["differs"]["0.5"]["several"]["few"] is True
    with pytest.raises(ValueError, match="no column 'kind' at '0.5'; this report has the columns differs"):
        report.cells_table("kind", "0.5")
    with pytest.raises(ValueError, match=r"no column 'differs'; it has prompt"):
        report_from_scores(made, by="differs")


def test_selected_pairs_keep_their_columns(scores: PairScores) -> None:
    named = replace(scores, prompts=[f"p{i}" for i in range(400)], columns={"number": list(range(400))})
    part = named.select(torch.arange(400) % 200 == 3)
    assert (part.prompts, part.columns) == (["p3", "p203"], {"number": [3, 203]})
    torch.testing.assert_close(part.margins, scores.margins[[3, 203]])
    assert scores.select(scores.p_chosen >= 0).prompts == ()


def test_records_are_reported_by_any_column(reward: LatentReward, tmp_path: Path) -> None:
    pairs = [
        {**pair, "category": ["animals", "food"][i % 2], "bucket": (8, 8)} for i, pair in enumerate(separable_pairs(6))
    ]
    report = evaluate_preferences(
        reward, iter(pairs), PROTOCOL, by=("category", "bucket"), progress=False, batch_size=4
    )
    plain = evaluate_preferences(reward, pairs, PROTOCOL, progress=False)
    assert {name: cell.accuracy.pairs for name, cell in report.by["category"]["0.5"].items()} == {
        "animals": 3,
        "food": 3,
    }
    assert list(report.by["bucket"]["ensemble"]) == ["8x8"]
    assert report.accuracy["0.5"].value == plain.accuracy["0.5"].value
    assert plain.accuracy["0.5"].interval is None
    plot_evaluation(report, tmp_path / "by.png")
    assert (tmp_path / "by.png").stat().st_size > 20_000
    with pytest.raises(ValueError, match="has no column 'kind'; it has bucket, category, .*prompt"):
        evaluate_preferences(reward, pairs, PROTOCOL, by="kind", progress=False)
