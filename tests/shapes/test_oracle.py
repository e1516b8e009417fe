import pytest
import torch

from dina_reward.shapes.degradations import degrade
from dina_reward.shapes.oracle import Oracle, accuracy_table
from dina_reward.shapes.prompts import Scene, all_scenes
from dina_reward.shapes.renderer import render


@pytest.fixture(scope="module")
def oracle():
    return Oracle()


@pytest.fixture(scope="module")
def renders():
    scenes = all_scenes() * 2
    return scenes, render(scenes, torch.Generator().manual_seed(0))


def test_clean_renders_are_read_right(oracle, renders):
    scenes, images = renders
    scores = oracle(images, scenes)
    assert scores.attributes.float().mean(dim=0).min() >= 0.99
    assert scores.cleanness.mean() >= 0.99
    assert scores.cleanness.min() >= 0.85
    assert scores.quality.mean() >= 0.99


@pytest.mark.parametrize(("kind", "least"), [("blur", 0.95), ("noise", 0.99), ("clutter", 0.99), ("ghost", 0.82)])
def test_moderately_degraded_renders_are_read_mostly_right_and_less_clean(oracle, renders, kind, least):
    scenes, images = renders
    scores = oracle(degrade(images, 0.6, torch.Generator().manual_seed(0), [kind]), scenes)
    assert scores.fit.mean() >= least
    assert scores.cleanness.mean() < 0.85


def test_each_wrong_attribute_costs_a_quarter_of_fit(oracle):
    image = render(["a large red circle on a white background"], torch.Generator().manual_seed(0))
    captions = {
        "a large red circle on a white background": (1.0, (True, True, True, True)),
        "a small red circle on a white background": (0.75, (False, True, True, True)),
        "a large blue circle on a black background": (0.5, (True, False, True, False)),
        "a small blue cross on a gray background": (0.0, (False, False, False, False)),
    }
    for caption, (fit, attributes) in captions.items():
        scores = oracle(image, [caption])
        assert scores.fit.item() == fit
        assert tuple(scores.attributes[0].tolist()) == attributes
        assert scores.quality.item() == pytest.approx(0.7 * fit + 0.3 * scores.cleanness.item())


def test_pure_noise_and_plain_images_are_not_clean(oracle):
    noise = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert oracle.read(noise).cleanness.max() < 0.2
    assert oracle.read(torch.full((1, 3, 32, 32), 0.25)).cleanness.item() < 0.5


def test_reading_does_not_depend_on_the_batch(oracle, renders):
    _, images = renders
    together, apart = oracle.read(images[:40]), oracle.read(images[:40], batch_size=7)
    assert torch.equal(together.indices, apart.indices)
    torch.testing.assert_close(together.residual, apart.residual, rtol=1e-3, atol=1e-4)


def test_reading_names_scenes(oracle):
    scene = Scene("small", "purple", "triangle", "gray")
    reading = oracle.read(render([scene], torch.Generator().manual_seed(0)))
    assert reading.scenes == [scene]


def test_empty_batches_work(oracle):
    assert oracle(torch.empty(0, 3, 32, 32), []).fit.shape == (0,)


def test_wrong_shapes_are_refused(oracle):
    with pytest.raises(ValueError, match=r"expected \(count, 3, 32, 32\)"):
        oracle.read(torch.zeros(2, 8, 8, 8))
    with pytest.raises(ValueError, match="one caption for each image"):
        oracle(torch.zeros(2, 3, 32, 32), all_scenes()[:1])


def test_accuracy_table_has_a_row_for_clean_and_each_degradation():
    lines = accuracy_table(renders_per_scene=1, strengths=(0.3,)).splitlines()
    assert len(lines) == 2 + 1 + 11
    assert lines[2].startswith("| clean | 100.0 |")
