from __future__ import annotations

import json
import math
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from PIL import Image

from dina_reward.data import LatentPreferenceDataset, Preference
from dina_reward.evaluation import (
    CallableScorer,
    LatentScorer,
    PairProtocol,
    Setting,
    comparison_table,
    evaluate_scorers,
    evaluation_settings,
    fit_variance,
    plot_comparison,
    score_dataset,
    score_pairs,
)
from dina_reward.evaluation.cells import MAX_CELLS, REST
from dina_reward.evaluation.ties import validation_half
from dina_reward.likelihood import ThurstoneModel
from dina_reward.noise.draws import fold_seed
from dina_reward.reward import LatentReward
from tests.evaluation.scored import first_value, pairs_with_scores, ranking_pairs
from tests.training.tiny_reward import separable_pairs, tiny_reward


SETTINGS = evaluation_settings((0.1, 0.5), [(0.2, 0.6)], kinds=("tokens", "mean"), draws=(1, 3))


@pytest.fixture(scope="module")
def reward(sd3_pipeline: Any) -> LatentReward:
    return tiny_reward(pipeline=sd3_pipeline).eval()


def compare(pairs: Any, **options: Any) -> Any:
    scorers = options.pop("scorers", None) or [CallableScorer(first_value, likelihood="bradley_terry")]
    return evaluate_scorers(scorers, pairs, progress=False, **{"resamples": 200, **options})


def accuracy(pairs: Any, ties: str, **options: Any) -> Any:
    return compare(pairs, ties=ties, **options).rewards[0].settings["score"].accuracy


# right, wrong, right (b preferred), predicted tie, tied label, both tied
ROWS = [(3, 1, 1.0), (1, 2, 0.8), (0, 1, 0.2), (2, 2, 1.0), (4, 1, 0.5), (1, 1, 0.5)]


@pytest.mark.parametrize(
    ("ties", "correct", "counted"),
    [("half", 2.5, 4), ("imagereward", 2, 4), ("dina_lrm", 2, 6), ("pickscore", 2 + 0.5 + 0.5 + 1, 6)],
)
def test_conventions_end_to_end(ties: str, correct: float, counted: int) -> None:
    result = accuracy(pairs_with_scores(ROWS), ties, tie_threshold=0.0)
    assert result.value == pytest.approx(correct / counted)
    assert (result.counted, result.target_ties, result.predicted_ties, result.convention) == (counted, 2, 2, ties)
    assert result.interval[0] <= result.value <= result.interval[1]


def test_hpdv2_counts_inversions_of_whole_rankings() -> None:
    # x: scores 4 2 3 1 against ranks 1 2 3 4: one inversion of 6. y: 1 2 3 against 1 2 2: two inversions of 3.
    pairs = [*ranking_pairs("x", [4, 2, 3, 1], [1, 2, 3, 4]), *ranking_pairs("y", [1, 2, 3], [1, 2, 2])]
    comparison = compare(pairs, ties="hpdv2")
    result = comparison.rewards[0].settings["score"].accuracy
    assert result.value == pytest.approx(((1 - 1 / 6) + (1 - 2 / 3)) / 2)
    assert result.rankings == 2
    # The resamples of two rankings are either of them or both.
    assert result.interval == pytest.approx((1 / 3, 5 / 6))
    assert comparison.rewards[0].cost.samples == 7
    assert "averaged over 2 rankings" in comparison_table(comparison)
    assert not comparison.notes


def test_hpdv2_needs_rankings_and_says_when_they_have_gaps() -> None:
    with pytest.raises(ValueError, match="does not say which pairs belong to one"):
        compare(pairs_with_scores(ROWS), ties="hpdv2")
    pairs = [*ranking_pairs("x", [3, 2, 1], [1, 2, 3], leave_out=(0, 2)), *ranking_pairs("y", [1, 2], [1, 2])]
    assert "1 rankings lack pairs" in compare(pairs, ties="hpdv2").notes[0]


def test_pickscore_tunes_on_one_half_and_reports_on_the_other() -> None:
    # Margins of 0.1 are ties and of 1 are not, in both halves; tuned, every pair is right.
    rows = [((i % 2) * 0.9 + 0.1, 0.0, 0.5 if i % 2 == 0 else 1.0) for i in range(40)]
    comparison = compare(pairs_with_scores(rows, prompts=[f"prompt {i // 4}" for i in range(40)]), ties="pickscore")
    report = comparison.rewards[0].settings["score"]
    assert (report.accuracy.value, report.accuracy.counted) == (1.0, 20)
    assert report.threshold.value == pytest.approx(0.1)
    assert (report.threshold.origin, report.threshold.validation_pairs) == ("tuned", 20)
    assert "tuned on 20 other pairs" in comparison_table(comparison)
    given = compare(pairs_with_scores(rows), ties="pickscore", tie_threshold=0.0).rewards[0].settings["score"]
    assert (given.accuracy.value, given.accuracy.counted) == (0.75, 40)
    assert given.threshold.origin == "given"


def test_the_reported_half_has_no_part_in_the_tuning() -> None:
    # Ties of the half that is tuned on have margins of 0.1, those of the reported half 0.4, beyond the threshold.
    prompts = [f"prompt {i // 4}" for i in range(40)]
    held = validation_half(prompts, seed=0)
    rows = [((0.1 if held[i] else 0.4) if i % 2 == 0 else 1.0, 0.0, 0.5 if i % 2 == 0 else 1.0) for i in range(40)]
    report = compare(pairs_with_scores(rows, prompts=prompts), ties="pickscore").rewards[0].settings["score"]
    assert report.threshold.value == pytest.approx(0.1)
    assert report.accuracy.value == pytest.approx(0.75)


def test_calibration_of_a_callable_is_bradley_terry_or_nothing() -> None:
    pairs = pairs_with_scores([(2, 0, 1.0), (0, 1, 1.0)])
    fit = compare(pairs).rewards[0].settings["score"].calibration
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    assert fit.brier == pytest.approx(sum((1 - each) ** 2 for each in p) / 2, rel=1e-5)
    plain = compare(pairs, scorers=[CallableScorer(first_value)])
    assert plain.rewards[0].settings["score"].calibration is None
    assert "no probabilities, so no calibration" in comparison_table(plain)


def test_slices_distribution_and_paired_difference() -> None:
    rows = [(1, 0, 1.0), (0, 1, 1.0), (2, 0, 1.0), (3, 0, 1.0)]
    pairs = pairs_with_scores(rows, sources=["x", "x", "y", "y"])

    def opposite(latents: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return -first_value(latents, prompts)

    comparison = compare(pairs, scorers=[CallableScorer(first_value), CallableScorer(opposite)])
    report = comparison.rewards[0].settings["score"]
    assert {name: (c.accuracy.value, c.accuracy.pairs) for name, c in report.by["source"].items()} == {
        "x": (0.5, 2),
        "y": (1.0, 2),
    }
    assert {name: cell.accuracy.pairs for name, cell in report.by["resolution"].items()} == {"latent 4x4": 4}
    assert report.distribution.mean == pytest.approx(7 / 8)
    (difference,) = comparison.differences
    assert difference.value == pytest.approx(0.25 - 0.75)
    assert difference.reward == ("opposite", "score")
    assert difference.interval[0] <= -0.5 <= difference.interval[1]


def test_many_sources_are_pooled() -> None:
    count = MAX_CELLS + 5
    pairs = pairs_with_scores([(1, 0, 1.0)] * count, sources=[f"source {i}" for i in range(count)])
    by_source = compare(pairs).rewards[0].settings["score"].by["source"]
    assert len(by_source) == MAX_CELLS + 1
    assert by_source[REST].accuracy.pairs == 5


def test_latent_scores_agree_with_the_reward(reward: LatentReward) -> None:
    pairs = separable_pairs(6)
    ours = score_dataset(LatentScorer(reward, SETTINGS), pairs, batch_size=5, progress=False)
    names = [setting.name for setting in SETTINGS]
    assert names[:6] == ["0.1", "0.5", "0.1 x3", "0.5 x3", "0.2+0.6 tokens", "0.2+0.6 mean"]
    # One draw: the same noise and scores as `score_pairs`.
    for kind in ("tokens", "mean"):
        old = score_pairs(reward, pairs, PairProtocol((0.1, 0.5), (0.2, 0.6), kind), progress=False)
        columns = [0, 1, names.index(f"0.2+0.6 {kind}")]
        torch.testing.assert_close(ours.table.margins(ours.scores)[:, columns], old.margins, atol=1e-5, rtol=1e-4)
    # Three draws: the reward's own average over draws.
    options = {"noise_level": (0.2, 0.6), "num_noise_samples": 3, "seed": [fold_seed(0, 4)]}
    expected = reward(pairs[4]["rejected"][None], pairs[4]["prompt"], **options)
    column = names.index("0.2+0.6 tokens x3")
    torch.testing.assert_close(ours.scores[ours.table.b[4], column], expected[0], atol=1e-5, rtol=1e-4)


def test_probabilities_are_the_thurstone_ones(reward: LatentReward) -> None:
    scorer = LatentScorer(reward, (Setting((0.5,)), Setting((0.2, 0.6))))
    thurstone = ThurstoneModel()
    margins = torch.tensor([[0.7, 0.7]])
    expected = thurstone.probability(margins[0, :1], torch.zeros(1), torch.tensor([0.5]))
    torch.testing.assert_close(scorer.probabilities(margins)[0, :1], expected)
    spread = (2 * (2 * (0.04 + 0.36) / 2 + 0.05) + 1e-6) ** 0.5
    assert float(scorer.probabilities(margins)[0, 1]) == pytest.approx(NormalDist().cdf(0.7 / spread), abs=1e-5)


def test_the_variance_that_fits_is_told(reward: LatentReward) -> None:
    latents = torch.randn(2, 12, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = [Preference(f"p{i}", latents[0, i], latents[1, i], 0.2 + 0.05 * i) for i in range(12)]
    settings = (Setting((0.2,)), Setting((0.5,)), Setting((0.5,), 2), Setting((0.2, 0.5)))
    scored = score_dataset(LatentScorer(reward, settings), pairs, progress=False)
    margins = scored.table.margins(scored.scores)
    labels = torch.special.ndtr(margins[:, 0] / margins[:, 0].std())
    pairs = [replace(pair, p_a=float(label)) for pair, label in zip(pairs, labels, strict=True)]
    comparison = evaluate_scorers([LatentScorer(reward, settings)], pairs, resamples=10, progress=False)
    fitted = fit_variance(margins[:, :2], (0.2, 0.5), labels)
    found = comparison.rewards[0].fitted_variance
    assert found is not None
    assert (found.variance_scale, found.variance_offset) == pytest.approx(
        (fitted.variance_scale, fitted.variance_offset), rel=1e-3, abs=1e-9
    )
    assert f"variance_offset {fitted.variance_offset:.3g}" in comparison_table(comparison)
    single = evaluate_scorers([LatentScorer(reward, settings[:1])], pairs, resamples=10, progress=False)
    assert single.rewards[0].fitted_variance is None


def test_images_of_a_ranking_are_scored_once_under_one_noise(reward: LatentReward) -> None:
    latents = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pairs = [
        Preference("a cat", latents[i], latents[j], 1.0, group="g", a_name=f"{i}", b_name=f"{j}")
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    same = [Preference("a cat", latents[0], latents[0], 1.0, group="h", a_name="p", b_name="q")]
    scored = score_dataset(LatentScorer(reward, SETTINGS[:1]), pairs + same, progress=False)
    assert scored.cost.samples == 5
    margins = scored.table.margins(scored.scores)[:, 0]
    assert float(margins[0] + margins[2]) == pytest.approx(float(margins[1]), abs=1e-5)
    assert float(margins[3]) == pytest.approx(0, abs=1e-6)
    assert abs(float(margins[0])) > 1e-4


def test_images_are_encoded_and_latents_decoded(reward: LatentReward, sd3_pipeline: Any) -> None:
    pictures = [Image.new("RGB", size, colour) for size, colour in (((64, 64), "red"), ((96, 64), "blue"))]
    pairs = [Preference("red", *pictures, 1.0, group="g")]
    scored = score_dataset(LatentScorer(reward, SETTINGS[:1]), pairs, pipeline=sd3_pipeline, progress=False)
    latents = reward.family.encode_images(sd3_pipeline, [pictures[1]])
    expected = reward(latents, "red", noise_level=0.1, seed=[fold_seed(0, zlib.crc32(b"g"), 1)])
    torch.testing.assert_close(scored.scores[1], expected, atol=1e-5, rtol=1e-4)
    assert scored.table.resolutions == ["64x64 and 96x64"]
    assert scored.cost.prepare_seconds_per_1000 > 0

    def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 0].mean(dim=(1, 2))

    seen = score_dataset(CallableScorer(redness), pairs, progress=False)
    assert seen.scores[:, 0].tolist() == pytest.approx([1.0, 0.0])
    decoded = score_dataset(CallableScorer(redness), separable_pairs(2), pipeline=sd3_pipeline, progress=False)
    pixels = reward.family.decode_latents(sd3_pipeline, separable_pairs(2)[0]["chosen"][None])
    assert float(decoded.scores[0, 0]) == pytest.approx(float(pixels[:, 0].mean()), abs=1e-5)


def test_report_is_json_table_and_picture(reward: LatentReward, tmp_path: Path) -> None:
    scorers = [
        LatentScorer(reward, SETTINGS),
        CallableScorer(lambda latents, prompts: latents.mean((1, 2, 3)), name="m"),
    ]
    comparison = compare(separable_pairs(8), scorers=scorers, dataset="toy")
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert data["rewards"][0]["settings"]["0.5"]["accuracy"]["convention"] == "half"
    assert data["rewards"][0]["settings"]["0.5"]["calibration"]["brier"] >= 0
    cost = data["rewards"][0]["cost"]
    assert cost["seconds_per_1000"]["0.1 x3"] > 2 * cost["seconds_per_1000"]["0.1"] > 0
    assert cost["peak_memory"] > 1e8
    table = comparison_table(comparison)
    for text in (
        "# toy: 8 pairs, 2 prompts",
        "tie convention 'half'",
        "0.2+0.6 mean x3",
        "peak process memory",
        "m (score) minus",
    ):
        assert text in table
    plot_comparison(comparison, tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size[0] > 1500


def test_bad_input_is_refused(reward: LatentReward) -> None:
    pairs = pairs_with_scores(ROWS)
    scorer = CallableScorer(first_value)
    with pytest.raises(ValueError, match="need different names"):
        compare(pairs, scorers=[scorer, scorer])
    with pytest.raises(ValueError, match="no preference pairs"):
        compare([])
    with pytest.raises(ValueError, match="reads images and the dataset holds latents"):
        compare(pairs, scorers=[CallableScorer(lambda images, prompts: images.sum((1, 2, 3)), name="f")])
    with pytest.raises(ValueError, match="gave no score for the prompt 'prompt 0'"):
        compare(pairs, scorers=[CallableScorer(lambda latents, prompts: [None] * len(prompts), name="f")])
    with pytest.raises(ValueError, match="unknown tie convention 'strict'"):
        compare(pairs, ties="strict")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        score_dataset(scorer, pairs, batch_size=0)
    with pytest.raises(ValueError, match="needs a noise level"):
        LatentScorer(reward, [Setting()])
    with pytest.raises(ValueError, match="likelihood must be"):
        CallableScorer(first_value, likelihood="thurstone")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least two levels"):
        evaluation_settings((0.1,), [(0.2,)])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluation_settings((), ())
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        Setting((40.0,))
    one_prompt = pairs_with_scores(ROWS, prompts=["x"] * 6)
    comparison = compare(one_prompt)
    assert "no confidence interval" in comparison.notes[0]
    assert comparison.to_dict()["rewards"][0]["settings"]["score"]["accuracy"]["interval"] == [None, None]


def test_rows_of_training_data_keep_their_source_and_bucket() -> None:
    rows = LatentPreferenceDataset(["x"], torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    row = {**rows[0], "source": "s", "group": "g", "bucket": (832, 1248)}
    table = score_dataset(CallableScorer(first_value), [row], progress=False).table
    assert (table.sources, table.groups, table.resolutions) == (["s"], ["g"], ["832x1248"])


def test_by_any_column_and_the_worst_part_beside_the_total(tmp_path: Path) -> None:
    rows = [(1, 0, 1.0)] * 150 + [(0, 1, 1.0)] * 100
    kinds = ["size"] * 150 + ["shape"] * 100
    pairs = [
        replace(pair, columns={"differs": kind, "votes": 3})
        for pair, kind in zip(pairs_with_scores(rows), kinds, strict=True)
    ]
    comparison = compare(pairs, by=("differs", "source"))
    by = comparison.rewards[0].settings["score"].by
    assert {name: (c.accuracy.value, c.mean_margin) for name, c in by["differs"].items()} == {
        "size": (1.0, 1.0),
        "shape": (0.0, -1.0),
    }
    assert by["differs"]["shape"].calibration_error == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)
    assert by["source"] == {}
    table = comparison_table(comparison)
    assert "60.0 % overall; worst: shape 0.0 % of 100 pairs" in table
    assert "| shape 0.0 % of 100 pairs |" in table  # beside the total in the first table
    assert "## By source" not in table
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["rewards"][0]["settings"]["score"]["by"]
    plot_comparison(compare(pairs, by=("differs", "votes", "prompt", "resolution")), tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size[1] > 1235
    with pytest.raises(
        ValueError, match=r"no column 'kind'; it has differs, group, prompt, resolution, source, votes"
    ):
        compare(pairs, by="kind")


def test_two_rewards_by_a_column_stand_side_by_side() -> None:
    pairs = pairs_with_scores([(1, 0, 1.0), (0, 1, 1.0)], sources=["x", "y"])
    scorers = [CallableScorer(first_value, name=name) for name in ("one", "other")]
    table = comparison_table(compare(pairs, scorers=scorers))
    assert "| source |   pairs |             one (score) |           other (score) |" in table
    assert "other, source, score: 50.0 % overall; no part has 100 pairs" in table
