import pytest
import torch

from dina_reward.shapes.prompts import SHAPES, Scene, all_scenes
from dina_reward.shapes.renderer import (
    MAX_OFFSET,
    PALETTE,
    RADIUS_RANGES,
    Placement,
    coverage,
    render,
    sample_placement,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_images_have_the_documented_shape_range_and_colors():
    scenes = all_scenes()
    images = render(scenes, generator())
    assert images.shape == (144, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    corner = images[:, :, 0, 0]
    assert torch.equal(corner, torch.tensor([PALETTE[scene.background] for scene in scenes]))


def test_the_middle_of_a_centred_shape_has_its_color():
    scenes = all_scenes()
    radius = torch.tensor([RADIUS_RANGES[scene.size][0] for scene in scenes])
    images = render(scenes, placement=Placement(center=torch.zeros(144, 2), radius=radius))
    torch.testing.assert_close(images[:, :, 16, 16], torch.tensor([PALETTE[scene.color] for scene in scenes]))


def test_rendering_is_seeded():
    scenes = all_scenes()[:8]
    assert torch.equal(render(scenes, generator(1)), render(scenes, generator(1)))
    assert not torch.equal(render(scenes, generator(1)), render(scenes, generator(2)))


def test_captions_and_scenes_render_alike():
    scenes = all_scenes()[:8]
    captions = [scene.caption for scene in scenes]
    assert torch.equal(render(scenes, generator()), render(captions, generator()))


def test_placements_stay_in_their_ranges():
    scenes = all_scenes() * 10
    placement = sample_placement(scenes, generator())
    low, high = torch.tensor([RADIUS_RANGES[scene.size] for scene in scenes]).unbind(1)
    assert placement.center.abs().max() <= MAX_OFFSET
    assert placement.center.std() > 1.6
    assert (placement.radius >= low).all()
    assert (placement.radius <= high).all()


def test_areas_match_the_geometry_to_two_percent():
    radius = 10.0
    areas = {"circle": 3.14159 * radius**2, "square": (1.8 * radius) ** 2, "triangle": 2 * radius**2}
    areas["cross"] = 4 / 3 * radius**2 + 4 / 3 * radius**2 - (2 / 3 * radius) ** 2
    placement = Placement(center=torch.zeros(4, 2), radius=torch.full((4,), radius))
    covers = coverage(torch.arange(4), placement).sum(dim=(1, 2))
    torch.testing.assert_close(covers, torch.tensor([areas[shape] for shape in SHAPES]), rtol=0.02, atol=0)


def test_outlines_are_antialiased():
    image = render([Scene("large", "red", "circle", "black")], generator())[0, 0]
    partial = (image > 0.01) & (image < 0.85)
    assert 20 < partial.sum() < 150


def test_render_needs_a_source_of_placements():
    with pytest.raises(ValueError, match="generator"):
        render(all_scenes()[:1])


def test_jitter_narrows_placements_around_the_middle():
    scenes = all_scenes()
    narrow = sample_placement(scenes, generator(), jitter=0.25)
    assert narrow.center.abs().max() <= 0.25 * MAX_OFFSET
    still = sample_placement(scenes, generator(), jitter=0.0)
    assert torch.equal(still.center, torch.zeros(len(scenes), 2))
    middles = torch.tensor([sum(RADIUS_RANGES[scene.size]) / 2 for scene in scenes])
    torch.testing.assert_close(still.radius, middles)
    with pytest.raises(ValueError, match="from 0"):
        sample_placement(scenes, generator(), jitter=2.0)
