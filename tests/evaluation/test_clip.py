from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dina_reward.data import Preference
from dina_reward.evaluation import CallableScorer, ClipReward, score_dataset
from tests.evaluation.tiny_clip import save_tiny_clip


PROMPTS = ["a red circle", "a blue square on a white background"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    pixels = torch.randint(0, 256, (2, 40, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return [Image.fromarray(each.numpy()) for each in pixels]


def by_hand(directory: Path, pictures: list[Image.Image]) -> torch.Tensor:
    """As PickScore's authors publish it: features of the two towers, normalised, times exp(logit_scale)."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(directory).eval(), CLIPProcessor.from_pretrained(directory)
    scores = []
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        pixels = processor.image_processor(images=picture, return_tensors="pt")
        tokens = processor.tokenizer(prompt, truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            image = model.visual_projection(model.vision_model(**pixels).pooler_output)
            text = model.text_projection(model.text_model(**tokens).pooler_output)
        cosine = (image / image.norm() * (text / text.norm())).sum()
        scores.append(model.logit_scale.detach().exp() * cosine)
    return torch.stack(scores)


def test_scores_are_the_scaled_cosine(directory: Path, pictures: list[Image.Image]) -> None:
    reward = ClipReward.from_pretrained(str(directory))
    scores = reward(pictures, PROMPTS)
    assert (scores.dtype, tuple(scores.shape)) == (torch.float32, (2,))
    torch.testing.assert_close(scores, by_hand(directory, pictures), atol=1e-4, rtol=1e-4)
    assert abs(float(scores[0] - scores[1])) > 1e-3
    assert reward.__name__ == "tiny-clip"


def test_tensors_are_read_as_the_images_they_are(directory: Path, pictures: list[Image.Image]) -> None:
    from dina_reward.evaluation.scored_pairs import images_to_tensor

    reward = ClipReward.from_pretrained(str(directory))
    torch.testing.assert_close(reward(images_to_tensor(pictures), PROMPTS), reward(pictures, PROMPTS))


def test_evaluates_as_a_scorer(directory: Path, pictures: list[Image.Image]) -> None:
    scorer = CallableScorer(ClipReward.from_pretrained(str(directory)), likelihood="bradley_terry")
    assert (scorer.name, scorer.inputs) == ("tiny-clip", "images")
    scored = score_dataset(scorer, [Preference(PROMPTS[0], *pictures, 1.0)], progress=False)
    first, second = scored.scores[:, 0]
    probability = scorer.probabilities(scored.table.margins(scored.scores))
    assert probability is not None
    assert float(probability) == pytest.approx(float(torch.softmax(torch.stack([first, second]), 0)[0]), rel=1e-5)


def test_long_prompts_are_cut(directory: Path, pictures: list[Image.Image]) -> None:
    reward = ClipReward.from_pretrained(str(directory))
    assert torch.isfinite(reward(pictures[:1], ["word " * 200])).all()


def test_bad_input_is_refused(directory: Path, pictures: list[Image.Image], tmp_path: Path) -> None:
    reward: Any = ClipReward.from_pretrained(str(directory))
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        reward(pictures, PROMPTS[:1])
    with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\)"):
        reward(torch.zeros(1, 16, 8, 8), PROMPTS[:1])
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        reward(torch.full((1, 3, 8, 8), 2.0), PROMPTS[:1])
    with pytest.raises(ValueError, match="cannot load a CLIP model"):
        ClipReward.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="cannot load a CLIP processor"):
        ClipReward.from_pretrained(str(directory), str(tmp_path))
