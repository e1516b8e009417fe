from collections import Counter

import pytest
import torch

from dina_reward.shapes.autoencoder import decode_latents
from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.preferences import (
    LABEL_NOISE,
    SOURCES,
    PreferencePairs,
    build_pool,
    preference_probability,
    sample_pairs,
)
from dina_reward.shapes.prompts import ATTRIBUTES, Scene


@pytest.fixture(scope="module")
def pool(shapes_pipeline):
    return build_pool(shapes_pipeline, "held_out", count=96, seed=0)


@pytest.fixture(scope="module")
def pairs(pool):
    return sample_pairs(pool, "held_out", count=3000, seed=0)


def test_pool_holds_every_source_equally_and_aligned_samples_as_given(shapes_pipeline, pool):
    assert pool.latents.shape == (5 * 96, 8, 8, 8)
    assert torch.equal(pool.source.bincount(), torch.full((5,), 96))
    more = build_pool(shapes_pipeline, "held_out", count=4, seed=0, aligned=pool.latents[:7].half())
    assert (more.source == SOURCES.index("aligned")).sum() == 7
    torch.testing.assert_close(more.latents[-7:], pool.latents[:7], rtol=0, atol=5e-3)


def test_renders_in_the_pool_are_cleaner_than_the_rest(pool):
    cleanness = {source: pool.cleanness[pool.source == index].mean() for index, source in enumerate(SOURCES[:5])}
    assert cleanness["render"] > max(cleanness[source] for source in cleanness if source != "render")


def test_captions_come_from_the_split_only(pairs):
    assert all(Scene.from_indices(row).held_out for row in pairs.scenes.tolist())


def test_gaps_are_the_oracles(shapes_pipeline, pairs):
    records = [pairs[index] for index in range(20)]
    prompts = [record["prompt"] for record in records]
    chosen, rejected = (
        Oracle()(
            decode_latents(shapes_pipeline.vae, torch.stack([record[side] for record in records])), prompts
        ).quality
        for side in ("chosen", "rejected")
    )
    gaps = torch.tensor([record["gap"] for record in records])
    torch.testing.assert_close(chosen - rejected, gaps, rtol=0, atol=1e-2)


def test_labels_err_as_often_as_stated(pairs):
    errors = (pairs.gap < 0).float().mean()
    expected = preference_probability(-pairs.gap.abs()).mean()
    assert abs(errors - expected) < 0.015
    assert preference_probability(torch.tensor(LABEL_NOISE)).item() == pytest.approx(0.8413, abs=1e-3)


def test_pairs_cover_all_gaps_and_kinds(pairs):
    gaps = pairs.gap.abs()
    assert (gaps < 0.1).float().mean() > 0.1
    assert (gaps > 0.3).float().mean() > 0.1
    kinds = {record["kind"] for record in pairs}
    assert {"sde-sde", "sde-render", "render-degraded", "ode-perturbed"} <= kinds


def shown_and_asked(pairs):
    """Attributes that the two latents of each pair show, and those that the caption asks for."""
    return pairs.indices[pairs.chosen], pairs.indices[pairs.rejected], pairs.scenes


def test_attribute_pairs_show_the_same_but_for_one_thing_which_one_of_them_has_right(pool):
    pairs = sample_pairs(pool, "held_out", count=400, seed=1, kinds={"attribute": 1.0})
    first, second, asked = shown_and_asked(pairs)
    assert torch.equal((first != second).sum(dim=1), torch.ones(400, dtype=torch.long))
    assert torch.equal(((first == asked) != (second == asked)).sum(dim=1), torch.ones(400, dtype=torch.long))
    counts = Counter(record["differs"] for record in pairs)
    assert set(counts) == {"size", "color", "shape", "background"}
    assert counts["shape"] > 150
    assert min(counts.values()) > 30


def test_cleanness_pairs_show_the_same_scene(pool):
    pairs = sample_pairs(pool, "held_out", count=200, seed=1, kinds={"cleanness": 1.0})
    first, second, _ = shown_and_asked(pairs)
    assert torch.equal(first, second)
    assert {record["differs"] for record in pairs} == {"cleanness"}
    difference = 0.3 * (pairs.cleanness[pairs.chosen] - pairs.cleanness[pairs.rejected])
    torch.testing.assert_close(pairs.gap, difference, rtol=0, atol=1e-6)


def test_hard_pairs_have_their_share(pairs):
    first, second, _ = shown_and_asked(pairs)
    one = ((first != second).sum(dim=1) == 1).float().mean().item()
    none = (first == second).all(dim=1).float().mean().item()
    assert 0.4 < one < 0.6
    assert 0.2 < none < 0.3


def test_what_differs_is_named_by_the_caption_not_by_the_images(pairs):
    for index in range(50):
        first, second, asked = (part[index] for part in shown_and_asked(pairs))
        wrong = [
            name
            for name, a, b, want in zip(ATTRIBUTES, first, second, asked, strict=True)
            if (a == want) != (b == want)
        ]
        assert pairs[index]["differs"] == ("cleanness" if not wrong else wrong[0] if len(wrong) == 1 else "several")


def test_outlines_are_named_where_nothing_else_differs(pool, pairs):
    place = list(ATTRIBUTES).index("shape")
    for index in range(200):
        shown = [ATTRIBUTES["shape"][int(pool.indices[side[index], place])] for side in (pairs.chosen, pairs.rejected)]
        record = pairs[index]
        if record["differs"] == "shape":
            assert record["outlines"].split(", ") == sorted(shown, key=ATTRIBUTES["shape"].index)
        else:
            assert record["outlines"] == "alike"


def test_circles_meet_squares_as_often_as_told(pool):
    def share(alike_weight: float) -> float:
        pairs = sample_pairs(pool, "held_out", 1500, seed=2, kinds={"attribute": 1.0}, alike_weight=alike_weight)
        outlines = Counter(record["outlines"] for record in pairs)
        return outlines["circle, square"] / (len(pairs) - outlines["alike"])

    # One of three wrong outlines for half of the right ones; with weight 12, twelve of fourteen where the pool has them.
    assert share(1.0) == pytest.approx(1 / 6, abs=0.06)
    assert share(12.0) == pytest.approx(0.5 * 12 / 14, abs=0.12)


def test_pairs_give_their_pool_back(pool, pairs):
    again = sample_pairs(pairs.pool, "held_out", count=3000, seed=0)
    assert all(torch.equal(value, vars(again)[name]) for name, value in vars(pairs).items())


def test_pairs_are_seeded(pool, pairs):
    again, other = (sample_pairs(pool, "held_out", count=3000, seed=seed) for seed in (0, 1))
    assert torch.equal(again.chosen, pairs.chosen)
    assert not torch.equal(other.chosen, pairs.chosen)


def test_pairs_survive_saving(pairs, tmp_path):
    pairs.save(tmp_path / "pairs.safetensors")
    loaded = PreferencePairs.load(tmp_path / "pairs.safetensors")
    assert len(loaded) == 3000
    assert loaded[7]["prompt"] == pairs[7]["prompt"]
    assert torch.equal(loaded[7]["chosen"], pairs[7]["chosen"])
