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
from dina_reward.shapes.prompts import Scene


@pytest.fixture(scope="module")
def pool(shapes_pipeline):
    return build_pool(shapes_pipeline, "held_out", count=96, seed=0)


@pytest.fixture(scope="module")
def pairs(pool):
    return sample_pairs(pool, "held_out", count=3000, seed=0)


def test_pool_holds_every_source_equally(pool):
    assert pool.latents.shape == (5 * 96, 8, 8, 8)
    assert torch.equal(pool.source.bincount(), torch.full((len(SOURCES),), 96))


def test_renders_in_the_pool_are_cleaner_than_the_rest(pool):
    cleanness = {source: pool.cleanness[pool.source == index].mean() for index, source in enumerate(SOURCES)}
    assert cleanness["render"] > max(cleanness[source] for source in SOURCES if source != "render")


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
