from __future__ import annotations

import torch

from dina_reward.shapes import Oracle, render, sample_scenes
from dina_reward.shapes.judges import height_in_picture, in_upper_half, noisy_labeller, noisy_quality


SCENES = sample_scenes(24, "train", seed=0)
IMAGES = render(SCENES, torch.Generator().manual_seed(0))
CAPTIONS = [scene.caption for scene in SCENES]


def test_the_labeller_errs_as_much_as_it_should_and_always_alike():
    quality = Oracle()(IMAGES, CAPTIONS).quality
    errors = noisy_quality(IMAGES, CAPTIONS) - quality
    assert torch.equal(noisy_quality(IMAGES, CAPTIONS), noisy_quality(IMAGES, CAPTIONS))
    assert 0.035 < float(errors.std()) < 0.085  # .0566 within sampling error
    torch.testing.assert_close(noisy_quality(IMAGES[3:5], CAPTIONS[3:5]), quality[3:5] + errors[3:5])


def test_comparisons_follow_the_quality():
    dark = IMAGES * 0.3 + 0.2
    better = noisy_labeller(IMAGES, dark, CAPTIONS)
    assert float(better.float().mean()) > 0.9
    assert torch.equal(better, noisy_labeller(IMAGES, dark, CAPTIONS))
    assert float(noisy_labeller(dark, IMAGES, CAPTIONS).float().mean()) < 0.1


def test_height_is_that_of_the_shape_whatever_the_colours():
    down = torch.roll(IMAGES, 4, dims=2)
    up = torch.roll(IMAGES, -4, dims=2)
    low, middle, high = (height_in_picture(images, CAPTIONS) for images in (down, IMAGES, up))
    for moved in (middle - low, high - middle):
        assert int(((moved - 4 / 31).abs() < 0.02).sum()) >= 22  # some shapes are rolled over the edge
    assert float(in_upper_half(up, CAPTIONS).mean()) > float(in_upper_half(down, CAPTIONS).mean()) + 0.3
