import pytest
import torch

from dina_reward.shapes.degradations import DEGRADATIONS, MAX_NOISE, degrade
from dina_reward.shapes.prompts import all_scenes
from dina_reward.shapes.renderer import render


@pytest.fixture(scope="module")
def images():
    return render(all_scenes(), torch.Generator().manual_seed(0))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_strength_zero_leaves_images_alone(images, kind):
    torch.testing.assert_close(degrade(images, 0.0, generator(), [kind]), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_damage_grows_with_strength(images, kind):
    damage = [
        (degrade(images, strength, generator(), [kind]) - images).square().mean() for strength in (0.2, 0.5, 1.0)
    ]
    assert 0 < damage[0] < damage[1] < damage[2]


def test_results_are_images_and_seeded(images):
    strength = torch.rand(len(images), generator=generator())
    spoiled = degrade(images, strength, generator(1))
    assert spoiled.shape == images.shape
    assert spoiled.min() >= 0
    assert spoiled.max() <= 1
    assert torch.equal(spoiled, degrade(images, strength, generator(1)))
    assert not torch.equal(spoiled, degrade(images, strength, generator(2)))


def test_noise_has_the_stated_deviation():
    gray = torch.full((64, 3, 32, 32), 0.5)
    deviation = DEGRADATIONS["noise"](gray, torch.full((64,), 0.4), generator()).std().item()
    assert deviation == pytest.approx(0.4 * MAX_NOISE, rel=0.02)


def test_blur_keeps_the_mean_of_an_image_with_a_plain_border(images):
    blurred = degrade(images, 0.3, generator(), ["blur"])
    torch.testing.assert_close(blurred.mean(dim=(2, 3)), images.mean(dim=(2, 3)), rtol=0, atol=5e-3)


def test_bad_arguments_are_refused(images):
    with pytest.raises(ValueError, match="expected one or more of blur"):
        degrade(images, 0.5, generator(), ["smear"])
    with pytest.raises(ValueError, match="from 0 to 1"):
        degrade(images, 1.5, generator())
