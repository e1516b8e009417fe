from __future__ import annotations

import json

import pytest
import torch

from dina_reward.data import CachedPreferences
from dina_reward.distill import JudgeError, JudgeLabeller, JudgeLimits, LabelReport, LabelSettings
from tests.distill.helpers import PROMPTS, Brightness, NoiseSource, brighter
from tests.training.tiny_reward import LATENT_SHAPE, tiny_reward


LIMITS = JudgeLimits(batch_size=8, retries=0)


def label(directory, judge, budget=40, *, limits=LIMITS, settings=None, source=None, **options):
    labeller = JudgeLabeller(judge, limits=limits, settings=settings)
    return labeller.label(directory, source or NoiseSource(), PROMPTS, budget, **options)


def test_scores_become_all_pairs_of_a_group(tmp_path):
    judge = Brightness()
    report = label(tmp_path / "labels", judge, budget=40)
    # 9 groups of 4, the first of them twice: 40 judgements.
    assert (report.groups, report.samples, report.judged, report.pairs) == (9, 36, 36, 9 * 6)
    assert report.calls == sum(judge.asked) == 40
    assert report.decoded == 40
    assert max(judge.asked) == 8
    rows = CachedPreferences(tmp_path / "labels")
    assert len(rows) == 54
    for row in rows:
        better, worse = (row[side][:1].mean() for side in ("chosen", "rejected"))
        assert better > worse
        assert row["p_chosen"] > 0.5
        assert row["score_chosen"] > row["score_rejected"]
        assert row["prompt"] in PROMPTS
    assert CachedPreferences(tmp_path / "labels").labels[0].mean() > 0.8
    scores = torch.tensor([row[name] for row in rows for name in ("score_chosen", "score_rejected")])
    assert 1.5 < scores.std() < 2.5
    assert report.scales["Brightness"].agreement == 1
    assert "9 groups" in str(report)


def test_every_answer_can_be_looked_up(tmp_path):
    label(tmp_path, Brightness(), budget=16, step=30)
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "judgements" / "Brightness").iterdir())]
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert samples["step"] == records[0]["step"] == 30
    assert [question for record in records for question in record["questions"]] == [*range(12), *range(4)]
    source = NoiseSource()
    latents = source.draw([samples["prompts"][5]], [samples["seeds"][5]])
    torch.testing.assert_close(float(latents[:, :1].mean()), records[0]["answers"][5], atol=1e-4, rtol=1e-4)


def test_a_killed_call_goes_on_and_asks_nothing_twice(tmp_path):
    whole = label(tmp_path / "whole", Brightness(), budget=48)
    broken = Brightness(fail_after=2)
    source = NoiseSource()
    with pytest.raises(JudgeError, match=r"raised RuntimeError: out of order.*The answers so far are kept in"):
        label(tmp_path / "killed", broken, budget=48, source=source)
    assert sum(broken.asked) == 16
    drawn = source.drawn
    later = Brightness()
    report = label(tmp_path / "killed", later, budget=48, source=source)
    assert sum(later.asked) == report.calls - 16
    assert source.drawn == drawn
    rows, expected = CachedPreferences(tmp_path / "killed"), CachedPreferences(tmp_path / "whole")
    assert len(rows) == len(expected) == whole.pairs
    for row, other in zip(rows, expected, strict=True):
        assert torch.equal(row["chosen"], other["chosen"])
        assert row["p_chosen"] == other["p_chosen"]
    again = Brightness(fail_after=0)
    assert label(tmp_path / "killed", again, budget=48).pairs == report.pairs
    assert again.asked == []


def test_other_settings_do_not_go_on_with_these_labels(tmp_path):
    label(tmp_path, Brightness(), budget=16)
    with pytest.raises(ValueError, match="holds a cache of another dataset"):
        label(tmp_path, Brightness(), budget=24)
    with pytest.raises(ValueError, match="step: 0 there, 3 here"):
        label(tmp_path, Brightness(), budget=16, step=3)


def test_noisy_scores_make_soft_labels(tmp_path):
    sure = label(tmp_path / "sure", Brightness(), budget=200).scales["Brightness"]
    report = label(tmp_path / "noisy", Brightness(noise=1.0), budget=200)
    scale = report.scales["Brightness"]
    # Of a judge that never contradicts itself half a median gap; of a noisy one what its noise makes it.
    assert sure.agreement == 1
    assert sure.temperature < 0.5 * scale.temperature
    assert 0.4 < scale.temperature < 5
    assert scale.agreement < 0.95
    labels, _ = CachedPreferences(tmp_path / "noisy").labels
    assert 0.5 <= labels.min() < 0.6
    assert ((labels > 0.55) & (labels < 0.95)).mean() > 0.2


def test_ties_are_kept(tmp_path):
    def coarse(images, prompts):
        return images.flatten(1).mean(1).sub(0.5).sign()

    report = label(tmp_path, coarse, budget=60)
    labels, _ = CachedPreferences(tmp_path).labels
    assert report.ties == (labels == 0.5).sum() > 5
    assert report.pairs > report.ties


def test_verdicts_on_pairs(tmp_path):
    asked = []

    def judge(images_a, images_b, prompts):
        asked.extend(prompts)
        return brighter(images_a, images_b, prompts)

    report = label(tmp_path, judge, budget=40)
    assert report.calls == len(asked) <= 40
    assert report.pairs == 9 * 4
    assert report.decoded == 2 * report.calls
    for row in CachedPreferences(tmp_path):
        assert row["chosen"][:1].mean() > row["rejected"][:1].mean()
        assert "score_chosen" not in row or row["score_chosen"] != row["score_chosen"]


def test_a_judge_that_prefers_the_first_side_is_found_out(tmp_path):
    def first(images_a, images_b, prompts):
        return [0.9 if prompt != "red" else 0.8 for prompt in prompts]

    with pytest.raises(JudgeError, match="finds all 36 pairs equal"):
        label(tmp_path, first, budget=40)


def test_several_judges_are_weighed(tmp_path):
    def dark(images, prompts):
        return -images.flatten(1).mean(1).logit()

    settings = LabelSettings(temperature=1.0)
    labeller = JudgeLabeller([Brightness(), dark], weights=[3, 1], limits=LIMITS, settings=settings)
    report = labeller.label(tmp_path, NoiseSource(), PROMPTS, 40)
    assert report.calls == 40
    assert report.groups == 5
    for row in CachedPreferences(tmp_path):
        gap = float(row["chosen"][:1].mean() - row["rejected"][:1].mean())
        p = float(torch.special.ndtr(torch.tensor(gap, dtype=torch.float64)))
        assert row["p_chosen"] == pytest.approx(0.75 * p + 0.25 * (1 - p), abs=1e-4)


def test_samples_without_an_opinion_are_left_out(tmp_path):
    def sometimes(images, prompts):
        return [
            None if prompt == "red" else float(image.mean()) for image, prompt in zip(images, prompts, strict=True)
        ]

    label(tmp_path, sometimes, budget=40)
    assert {row["prompt"] for row in CachedPreferences(tmp_path)} == {"a cat", "a dog", "blue"}


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda images: torch.full((len(images),), 0.3), "scored all of 16 scores 0.3, so nothing can be learned"),
        (lambda images: [float("nan")] * len(images), "nan for row 0"),
        (lambda images: [1.0], r"expected one number per row"),
        (lambda images: [None] * len(images), "has an opinion of no pair"),
    ],
)
def test_judges_of_no_use_are_named(tmp_path, judge, message):
    with pytest.raises(JudgeError, match=message):
        label(tmp_path, judge, budget=40)


def test_a_scale_that_changes_from_call_to_call(tmp_path):
    calls = []

    def moody(images, prompts):
        calls.append(1)
        return images.flatten(1).mean(1) * (100 if len(calls) == 3 else 1)

    with pytest.raises(JudgeError, match="its scale differs from call to call"):
        label(tmp_path, moody, budget=60)


def test_cost_over_budget_stops_before_the_call_and_loses_nothing(tmp_path):
    judge = Brightness()
    limits = JudgeLimits(batch_size=8, retries=0, cost_per_call=0.5, max_cost=9.0)
    with pytest.raises(
        JudgeError, match=r"has cost 8, and the next 8 answers would cost about 4 more than max_cost 9"
    ):
        label(tmp_path, judge, budget=40, limits=limits)
    assert sum(judge.asked) == 16
    more = Brightness()
    report = label(tmp_path, more, budget=40, limits=JudgeLimits(batch_size=8, cost_per_call=0.5, max_cost=20.0))
    assert (report.calls, report.cost, sum(more.asked)) == (40, 20.0, 24)


def test_failed_calls_are_tried_again(tmp_path):
    tries = []

    def shaky(images, prompts):
        tries.append(len(prompts))
        if len(tries) == 2:
            raise ConnectionError("lost")
        return images.flatten(1).mean(1)

    report = label(tmp_path, shaky, budget=16, limits=JudgeLimits(batch_size=8, retries=1, retry_seconds=0))
    assert (report.calls, len(tries)) == (16, 4)


def test_a_budget_without_a_single_group(tmp_path):
    with pytest.raises(ValueError, match="a budget of 3 judgements is too small: one group of 4 samples takes 4"):
        label(tmp_path, Brightness(), budget=3)
    with pytest.raises(ValueError, match="prompts must be a string or a list of at least one"):
        JudgeLabeller(Brightness()).label(tmp_path, NoiseSource(), [], 40)


def test_the_reward_says_what_is_informative(tmp_path):
    reward = tiny_reward().eval()
    settings = LabelSettings(group_size=2, candidates=6, exploration=0.0)
    source = NoiseSource(LATENT_SHAPE)
    report = label(tmp_path / "a", Brightness(), budget=12, settings=settings, source=source, reward=reward)
    assert (report.groups, report.samples, report.pairs, report.calls) == (5, 30, 5, 12)
    assert report.judged == 10
    chosen = json.loads((tmp_path / "a" / "samples.json").read_text())["groups"]
    blind = LabelSettings(group_size=2, candidates=6, exploration=1.0)
    label(tmp_path / "b", Brightness(), budget=12, settings=blind, source=source, reward=reward)
    assert chosen != json.loads((tmp_path / "b" / "samples.json").read_text())["groups"]


def test_scales_of_an_earlier_round_are_kept(tmp_path):
    first = label(tmp_path / "0", Brightness(), budget=40)
    later = label(tmp_path / "1", Brightness(), budget=40, seed=5, scales=first.scales)
    assert later.scales == first.scales
    assert LabelReport.read(tmp_path / "1") == later
    with pytest.raises(ValueError, match="holds no"):
        LabelReport.read(tmp_path)
