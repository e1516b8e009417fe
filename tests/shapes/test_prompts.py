import random
from collections import Counter

import pytest

from dina_reward.shapes.prompts import (
    ATTRIBUTES,
    Scene,
    all_scenes,
    change_attributes,
    sample_prompts,
    sample_scenes,
)


def test_captions_and_indices_round_trip_for_every_scene():
    scenes = all_scenes()
    assert len(set(scenes)) == len({scene.caption for scene in scenes}) == 144
    for scene in scenes:
        assert Scene.parse(scene.caption) == scene
        assert Scene.from_indices(scene.indices) == scene


def test_caption_reads_as_documented():
    scene = Scene(size="large", color="red", shape="circle", background="white")
    assert scene.caption == "a large red circle on a white background"
    assert Scene.parse("  A Large red  circle on a white background ") == scene


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red circle on a white background",
        "a large red circle on a white background, please",
        "a huge red circle on a white background",
        "a large white circle on a red background",
    ],
)
def test_parse_refuses_what_the_grammar_cannot_say(caption):
    with pytest.raises(ValueError, match="expected"):
        Scene.parse(caption)


def test_scene_names_the_wrong_attribute_and_the_choices():
    with pytest.raises(ValueError, match=r"color is 'pink'; expected one of red, orange"):
        Scene("large", "pink", "circle", "white")


def test_splits_are_disjoint_complete_and_balanced():
    train, held_out = all_scenes("train"), all_scenes("held_out")
    assert len(train) == 96
    assert len(held_out) == 48
    assert set(train) | set(held_out) == set(all_scenes())
    for scenes in (train, held_out):
        for name, values in ATTRIBUTES.items():
            counts = Counter(getattr(scene, name) for scene in scenes)
            assert set(counts) == set(values)
            assert len(set(counts.values())) == 1


def test_training_shows_every_pair_of_values_but_no_held_out_triple():
    def pairs(scenes):
        return {(a, b) for scene in scenes for a in scene.indices for b in scene.indices}

    def triples(scenes):
        return {(scene.color, scene.shape, scene.background) for scene in scenes}

    train, held_out = all_scenes("train"), all_scenes("held_out")
    assert pairs(train) == pairs(all_scenes())
    assert not triples(train) & triples(held_out)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, held_out"):
        all_scenes("test")


def test_sampling_is_seeded_and_even():
    assert sample_prompts(50, seed=3) == sample_prompts(50, seed=3)
    assert sample_prompts(50, seed=3) != sample_prompts(50, seed=4)
    counts = Counter(sample_scenes(48 * 3, "held_out", seed=0))
    assert set(counts.values()) == {3}
    assert all(scene.held_out for scene in counts)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_change_attributes_changes_exactly_so_many(count):
    rng = random.Random(0)
    for scene in all_scenes():
        changed = change_attributes(scene, count, rng)
        assert sum(a != b for a, b in zip(scene.indices, changed.indices, strict=True)) == count
