from __future__ import annotations

import math
import time

import pytest
import torch

from dina_reward.distill.judges import CallableJudge, JudgeBatch, JudgeError, as_judges, judge_weights


IMAGES = torch.tensor([0.1, 0.9, 0.4])[:, None, None, None].expand(3, 3, 2, 2)
SAMPLES = JudgeBatch(["x", "y", "z"], {"images": IMAGES, "latents": IMAGES})
PAIRS = JudgeBatch(["x", "y"], {"images_a": IMAGES[:2], "images_b": IMAGES[1:]})


def test_scores_of_images_and_of_latents():
    by_images = CallableJudge(lambda images, prompts: images.flatten(1).mean(1))
    by_latents = CallableJudge(lambda latents: [float(x.mean()) * 2 for x in latents])
    assert (by_images.kind, by_images.needs_images) == ("scores", True)
    assert (by_latents.kind, by_latents.needs_images) == ("scores", False)
    assert by_images.ask(SAMPLES) == pytest.approx([0.1, 0.9, 0.4])
    assert by_latents.ask(SAMPLES) == pytest.approx([0.2, 1.8, 0.8])


@pytest.mark.parametrize(
    ("verdicts", "answers"),
    [
        ([True, False], [1.0, 0.0]),
        (["A", " tie "], [1.0, 0.5]),
        (torch.tensor([0.25, 1.0]), [0.25, 1.0]),
        ([None, 0.5], [None, 0.5]),
        (None, [None, None]),
        (torch.tensor([True, False]), [1.0, 0.0]),
    ],
)
def test_verdicts_on_pairs(verdicts, answers):
    judge = CallableJudge(lambda images_a, images_b, prompts: verdicts)
    assert judge.kind == "pairs"
    assert judge.ask(PAIRS) == answers


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([0.1, 0.2], "shape \\(2,\\); expected one number per row"),
        ([0.1, math.nan, 0.2], "nan for row 1 of 3"),
        ([0.1, 0.2, math.inf], "inf for row 2 of 3"),
        ("good", "does not hold one number per row"),
    ],
)
def test_scores_that_cannot_be_used(result, message):
    def judge(images, prompts):
        return result

    with pytest.raises(JudgeError, match=f"the judge judge returned .*{message}"):
        CallableJudge(judge).ask(SAMPLES)


@pytest.mark.parametrize("result", [[1.5, 0.0], ["left", "b"], [0.5], [math.nan, 0.5], "ab"])
def test_verdicts_that_cannot_be_used(result):
    with pytest.raises(JudgeError, match=r"the judge .* returned"):
        CallableJudge(lambda images_a, images_b: result).ask(PAIRS)


def test_errors_and_time_outs_are_named():
    def broken(images):
        raise RuntimeError("no model")

    def slow(images):
        time.sleep(5)

    with pytest.raises(JudgeError, match="the judge broken raised RuntimeError: no model"):
        CallableJudge(broken, timeout=5).ask(SAMPLES)
    started = time.perf_counter()
    with pytest.raises(JudgeError, match=r"the judge slow gave no answer within 0\.05 s"):
        CallableJudge(slow, timeout=0.05).ask(SAMPLES)
    assert time.perf_counter() - started < 2


def test_what_is_no_judge():
    with pytest.raises(ValueError, match="names neither images nor latents"):
        CallableJudge(lambda prompts: [1.0])
    with pytest.raises(ValueError, match="names neither images nor latents"):
        CallableJudge(lambda **everything: [1.0])
    with pytest.raises(ValueError, match="both samples and sides"):
        CallableJudge(lambda images, images_a: [1.0])
    with pytest.raises(ValueError, match="no judge was given"):
        as_judges([])
    with pytest.raises(ValueError, match="must be one function or a list"):
        as_judges([3])


def test_several_judges_have_names_and_weights():
    judges = as_judges([lambda images: [1.0], lambda images: [2.0]])
    assert len({judge.name for judge in judges}) == 2
    assert judge_weights([3, 1], judges) == [0.75, 0.25]
    assert judge_weights(None, judges) == [0.5, 0.5]
    for wrong in ([1], [0, 0], [-1, 2], [math.nan, 1]):
        with pytest.raises(ValueError, match="judge weights must be 2 numbers"):
            judge_weights(wrong, judges)
