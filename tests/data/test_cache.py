"""Building a cache of rendered images with the embedded world's VAE, and reading it back."""

from __future__ import annotations

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dina_reward.data import (
    BucketBatchSampler,
    BucketRule,
    CachedPreferences,
    CacheReport,
    CacheSettings,
    Preference,
    build_cache,
    collate_preferences,
    load_preferences,
)
from dina_reward.data.buckets import Bucket, fit_image
from dina_reward.data.cache_index import describe_pair
from dina_reward.families import family_of
from dina_reward.shapes import load_pipeline
from tests.data.cache_world import SETTINGS, ImagePairs, make_pairs, shard_bytes


PAIRS = 60
EMBEDS = replace(SETTINGS, prompt_embeds=True, max_sequence_length=6)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline("flow")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> ImagePairs:
    return make_pairs(tmp_path_factory.mktemp("world") / "images", PAIRS, broken=[3])


@pytest.fixture(scope="module")
def built(
    pipeline: Any, pairs: ImagePairs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CacheReport, list[str]]:
    directory = tmp_path_factory.mktemp("cache") / "cache"
    encoded: list[str] = []
    encode = CountingVae(pipeline)
    try:
        report = build_cache(pairs, pipeline, directory, EMBEDS, max_broken=0.02, progress=False)
    finally:
        encode.restore()
    encoded = [str(size) for size in encode.sizes]
    return directory, report, encoded


class CountingVae:
    """Notes the batches that a pipeline's VAE encodes."""

    def __init__(self, pipeline: Any) -> None:
        self.vae, self.encode, self.sizes = pipeline.vae, pipeline.vae.encode, []
        pipeline.vae.encode = self._encode

    def _encode(self, pixels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sizes.append(tuple(pixels.shape))
        return self.encode(pixels, *args, **kwargs)

    def restore(self) -> None:
        self.vae.encode = self.encode


def expected_rows(pairs: ImagePairs) -> list[tuple[int, str]]:
    """Pairs that the cache must hold, and their buckets."""
    buckets = ("32x32", "48x32", "32x32", "16x16")
    return [(row, buckets[row % 4]) for row in range(PAIRS) if row != 3 and _shares(row)]


def _shares(row: int) -> bool:
    # Rows 9, 19, ... compare neighbouring images; of the sizes, 16 and 32 squares share 16x16.
    return row % 10 != 9 or row % 4 == 3


def test_the_report_counts_everything(built: tuple[Path, CacheReport, list[str]], pairs: ImagePairs) -> None:
    directory, report, encoded = built
    rows = CachedPreferences(directory)
    assert (report.dataset_pairs, report.broken, report.without_bucket) == (60, 1, 3)
    assert report.pairs == len(rows) == len(expected_rows(pairs)) == 56
    assert report.first_left_out[0] == "pair 3: row 3 of the dataset: the image cannot be read"
    assert report.first_left_out[1] == "pair 9: 48 x 32 and 64 x 64 share no bucket"
    latents = [path for path in shard_bytes(directory) if path.startswith("latents")]
    assert report.shards == len(latents) + 2
    assert json.loads((directory / "manifest.json").read_text())["report"]["images"] == report.images
    # Every different image once per bucket, in batches of three that end with their shard of eight.
    batches = [eval_size[0] for eval_size in map(_numbers, encoded)]
    assert sum(batches) == report.images == sum(report.images_per_bucket.values())
    assert report.images == len({(row["bucket"], name) for row, name in _names(rows, pairs)})
    assert set(batches) <= {1, 2, 3}
    assert "56 of 60 pairs" in str(report)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.strip("()").split(",")]


def _names(rows: CachedPreferences, pairs: ImagePairs) -> list[tuple[dict[str, Any], str]]:
    kept = [row for row, _ in expected_rows(pairs)]
    return [(entry, name) for entry, row in zip(rows, kept, strict=True) for name in _two(pairs[row])]


def _two(pair: Any) -> tuple[str, str]:
    return pair.a_name, pair.b_name


def test_rows_are_the_encoded_images(
    built: tuple[Path, CacheReport, list[str]], pairs: ImagePairs, pipeline: Any
) -> None:
    rows, family = CachedPreferences(built[0]), family_of(pipeline)
    for position, (number, _) in enumerate(expected_rows(pairs)):
        pair, row = pairs[number], rows[position]
        assert [row[name] for name in ("prompt", "source", "group")] == [pair.prompt, "shapes", pair.group]
        assert (row["p_chosen"], row["weight"]) == (pair.p_a, pair.weight)
        assert str(rows.buckets[rows.bucket_of[position]]) == row["bucket"]
        bucket = Bucket.parse(row["bucket"])
        for side, image in (("chosen", pair.a), ("rejected", pair.b)):
            latent = family.encode_images(pipeline, [fit_image(image, bucket)])[0]
            assert row[side].dtype == torch.float32
            torch.testing.assert_close(row[side], latent, atol=5e-3, rtol=1e-3)
    assert {row["bucket"] for row in rows} == {"32x32", "48x32", "16x16"}
    assert rows[0]["bucket"] == "32x32"
    assert rows[1]["bucket"] == "48x32"
    assert rows[1]["chosen"].shape == (8, 8, 12)


def test_prompt_embeddings(built: tuple[Path, CacheReport, list[str]], pipeline: Any) -> None:
    rows, family = CachedPreferences(built[0]), family_of(pipeline)
    assert rows.has_prompt_embeds
    assert built[1].prompts == 7
    for row in (rows[0], rows[17], rows[-1]):
        expected = family.encode_prompts(pipeline, [row["prompt"]], max_sequence_length=6)
        torch.testing.assert_close(row["prompt_embeds"], expected.prompt_embeds[0], atol=5e-3, rtol=1e-3)
        torch.testing.assert_close(row["pooled_prompt_embeds"], expected.pooled_prompt_embeds[0], atol=5e-3, rtol=1e-3)
        assert "prompt_embeds_mask" not in row


def test_prompts_are_stored_without_padding(pipeline: Any, pairs: ImagePairs, tmp_path: Path) -> None:
    """A family that masks padding: embeddings as long as the prompt, in another dtype."""
    from dina_reward.families import Conditioning

    family = family_of(pipeline)

    def encode(self: Any, pipeline: Any, prompts: Any, **options: Any) -> Conditioning:
        lengths = torch.tensor([len(prompt.split()) for prompt in prompts])
        mask = torch.arange(12)[None] < lengths[:, None]
        tokens = torch.arange(12.0)[None, :, None] + lengths[:, None, None] * torch.ones(1, 1, 4)
        return Conditioning(tokens, None, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(family), "encode_prompts", encode)
        few = ImagePairs(pairs.folder, 12)
        few.prompts = ["one", "two words", "now three words", "", *few.prompts[4:]]
        settings = replace(EMBEDS, embeds_dtype="bfloat16", prompts_per_shard=2)
        report = build_cache(few, pipeline, tmp_path / "cache", settings, progress=False)
    rows = CachedPreferences(tmp_path / "cache", dtype=None)
    for index, length in ((0, 1), (1, 2), (2, 3)):
        row = rows[index]
        assert row["prompt_embeds"].shape == (length, 4)
        assert row["prompt_embeds"].dtype == torch.bfloat16
        assert row["prompt_embeds"][:, 0].tolist() == [length + position for position in range(length)]
        assert row["prompt_embeds_mask"].tolist() == [True] * length
        assert "pooled_prompt_embeds" not in row
    assert rows[3]["prompt_embeds_mask"].tolist() == [False]
    assert report.prompts == 7


def test_random_access(built: tuple[Path, CacheReport, list[str]]) -> None:
    rows = CachedPreferences(built[0])
    assert torch.equal(rows[-1]["chosen"], rows[len(rows) - 1]["chosen"])
    for index in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError):
            rows[index]
    with pytest.raises(ValueError, match="read-only"):
        rows.bucket_of[0] = 1
    labels, weights = rows.labels
    assert labels.tolist() == [row["p_chosen"] for row in rows]
    assert weights.tolist() == [row["weight"] for row in rows]
    stored = CachedPreferences(built[0], dtype=None)[0]
    assert stored["chosen"].dtype == torch.float16


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_over_the_cache(built: tuple[Path, CacheReport, list[str]], workers: int) -> None:
    rows = CachedPreferences(built[0])
    pickled = pickle.dumps(rows)
    assert len(pickled) < 10_000
    copy = pickle.loads(pickled)
    sampler = BucketBatchSampler(copy.bucket_of, 4, seed=0)
    loader = DataLoader(copy, batch_sampler=sampler, collate_fn=collate_preferences, num_workers=workers)
    order = list(sampler)
    for indices, batch in zip(order, loader, strict=True):
        assert batch["prompts"] == [rows[index]["prompt"] for index in indices]
        assert torch.equal(batch["chosen"], torch.stack([rows[index]["chosen"] for index in indices]))


def test_load_preferences_opens_caches(built: tuple[Path, CacheReport, list[str]], tmp_path: Path) -> None:
    opened = load_preferences(built[0])
    assert isinstance(opened, CachedPreferences)
    shutil.copytree(built[0], tmp_path / "splits" / "test")
    assert len(load_preferences(tmp_path / "splits", "test")) == len(opened)
    with pytest.raises(ValueError, match="for the split 'train'"):
        load_preferences(tmp_path / "splits", "train")


@pytest.mark.parametrize("settings", [EMBEDS, replace(EMBEDS, batch_size=1)], ids=["same", "another batch size"])
def test_shards_repeat_to_the_byte(
    built: tuple[Path, CacheReport, list[str]],
    pairs: ImagePairs,
    pipeline: Any,
    tmp_path: Path,
    settings: CacheSettings,
) -> None:
    build_cache(pairs, pipeline, tmp_path / "again", settings, max_broken=0.02, progress=False, workers=1)
    again, first = shard_bytes(tmp_path / "again"), shard_bytes(built[0])
    assert list(again) == list(first)
    if settings is EMBEDS:
        assert again == first
    else:  # the VAE may round differently
        one, other = CachedPreferences(tmp_path / "again"), CachedPreferences(built[0])
        torch.testing.assert_close(one[7]["chosen"], other[7]["chosen"], atol=5e-3, rtol=1e-3)


def test_only_missing_shards_are_encoded(
    built: tuple[Path, CacheReport, list[str]], pairs: ImagePairs, pipeline: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "cache"
    shutil.copytree(built[0], directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest.update(complete=False)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    (directory / "pairs.arrow").unlink()
    (directory / "latents" / "32x32" / "000001.arrow").unlink()
    (directory / "latents" / "32x32" / ".000001.arrow.incomplete").write_text("half a shard")
    with pytest.raises(ValueError, match="unfinished"):
        CachedPreferences(directory)
    encode = CountingVae(pipeline)
    build_cache(pairs, pipeline, directory, EMBEDS, max_broken=0.02, progress=False)
    build_cache(pairs, pipeline, directory, EMBEDS, max_broken=0.02, progress=False)
    encode.restore()
    assert [size[0] for size in encode.sizes] == [3, 3, 2]
    assert shard_bytes(directory) == shard_bytes(built[0])
    assert not list(directory.rglob("*.incomplete"))


def test_another_fingerprint_is_refused(
    built: tuple[Path, CacheReport, list[str]], pairs: ImagePairs, pipeline: Any, tmp_path: Path
) -> None:
    def build(dataset: Any = pairs, pipe: Any = pipeline, settings: CacheSettings = EMBEDS) -> None:
        build_cache(dataset, pipe, built[0], settings, max_broken=0.02, progress=False)

    with pytest.raises(ValueError, match=r"batch_size: 3 there, 4 here"):
        build(settings=replace(EMBEDS, batch_size=4))
    with pytest.raises(ValueError, match=r"tolerance: 0.03 there, 0.1 here"):
        build(settings=replace(EMBEDS, rule=BucketRule(SETTINGS.rule.buckets, tolerance=0.1)))
    with pytest.raises(ValueError, match=r"pairs: 60 there, 50 here"):
        build(ImagePairs(pairs.folder, 50, [3]))
    other = ImagePairs(pairs.folder, PAIRS, [3])
    other.prompts[0] = "something else"
    with pytest.raises(ValueError, match=r"another dataset.*rows: "):
        build(other)
    weight = pipeline.vae.encoder.conv_in.weight
    with torch.no_grad():
        weight[0, 0, 0, 0] += 1
        try:
            with pytest.raises(ValueError, match=r"another pipeline.*vae_weights: "):
                build()
        finally:
            weight[0, 0, 0, 0] -= 1
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="not empty and no latent cache"):
        build_cache(pairs, pipeline, tmp_path, EMBEDS, progress=False)


def test_labels_without_images_are_part_of_the_fingerprint(pairs: ImagePairs, pipeline: Any, tmp_path: Path) -> None:
    few = ImagePairs(pairs.folder, 8)
    few.labels = (np.zeros(8), np.ones(8))  # type: ignore[attr-defined]
    build_cache(few, pipeline, tmp_path, SETTINGS, progress=False, dry_run=True)
    few.labels = (np.zeros(8), np.array([1, 1, 1, 1, 1, 1, 1, 2.0]))  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"another dataset.*labels: "):
        build_cache(few, pipeline, tmp_path, SETTINGS, progress=False)


def test_too_many_broken_pairs_stop_the_run(pairs: ImagePairs, pipeline: Any, tmp_path: Path) -> None:
    broken = ImagePairs(pairs.folder, PAIRS, [0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"of 60 rows are broken .*max_broken=0.05"):
        build_cache(broken, pipeline, tmp_path / "cache", SETTINGS, max_broken=0.05, progress=False)
    assert not (tmp_path / "cache" / "latents").exists()
    report = build_cache(broken, pipeline, tmp_path / "cache", SETTINGS, max_broken=0.1, progress=False)
    assert report.broken == 4


def test_unreadable_files_are_broken_pairs(
    pairs: ImagePairs, pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(pairs.folder, folder)
    image = (folder / "5.png").read_bytes()
    (folder / "5.png").write_bytes(image[:60])
    damaged = ImagePairs(folder, 40)
    report = build_cache(damaged, pipeline, tmp_path / "a", SETTINGS, max_broken=0.1, progress=False)
    assert report.broken == 2  # as a of pair 5 and b of pair 1
    # An image that disappears between index and encoding is an error, and nothing is lost by it.
    monkeypatch.setattr("dina_reward.data.cache.dataset_fingerprint", lambda pairs: {"pairs": len(pairs)})
    (folder / "5.png").write_bytes(image)
    build_cache(damaged, pipeline, tmp_path / "b", SETTINGS, progress=False, dry_run=True)
    (folder / "5.png").unlink()
    with pytest.raises(ValueError, match=r"pair 1 could be read when the dataset was indexed, but not now .*5\.png"):
        build_cache(damaged, pipeline, tmp_path / "b", SETTINGS, progress=False)


def test_names_must_be_unique(pairs: ImagePairs, pipeline: Any, tmp_path: Path) -> None:
    class Careless(ImagePairs):
        def __getitem__(self, row: Any) -> Any:
            return replace(super().__getitem__(row), a_name="image", b_name="")

    report = build_cache(Careless(pairs.folder, 8), pipeline, tmp_path, SETTINGS, max_broken=1, progress=False)
    assert (report.pairs, report.broken) == (1, 7)  # pairs 0 and 4 are of one size, and of two pictures
    assert "two images with one name: 'image' is another picture here than before" in report.first_left_out[3]
    assert "two images with one name: 'image' is 48 x 32 here, 32 x 32 before" in report.first_left_out[0]
    assert report.images == 2  # "image" once, the nameless one on its own


def test_what_cannot_be_cached(pairs: ImagePairs, pipeline: Any, tmp_path: Path) -> None:
    class Latents(ImagePairs):
        def __getitem__(self, row: Any) -> Any:
            return replace(super().__getitem__(row), b=torch.zeros(8, 8, 8))

    def build(dataset: Any = pairs, settings: CacheSettings = SETTINGS) -> None:
        build_cache(dataset, pipeline, tmp_path / "cache", settings, max_broken=0.1, progress=False)

    with pytest.raises(ValueError, match="no pairs"):
        build([])
    with pytest.raises(ValueError, match=r"bucket 33x32 does not fit the pipeline: image size 32 x 33"):
        build(settings=CacheSettings(BucketRule.of(("33x32",))))
    with pytest.raises(ValueError, match=r"side b of the pair .* is a Tensor; latents need no cache"):
        build(Latents(pairs.folder, 8))
    assert not (tmp_path / "cache" / "index" / "000000.arrow").exists()
    with pytest.raises(ValueError, match="none of the 60 pairs can be cached"):
        build_cache(pairs, pipeline, tmp_path / "big", CacheSettings(), max_broken=0.1, progress=False)
    for wrong in ({"latent_dtype": "int8"}, {"batch_size": 0}, {"max_sequence_length": 6}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(SETTINGS, **wrong)


def test_a_dry_run_reports_the_size(pairs: ImagePairs, pipeline: Any, tmp_path: Path) -> None:
    seen: list[CacheReport] = []
    report = build_cache(
        pairs, pipeline, tmp_path, EMBEDS, max_broken=0.1, progress=False, dry_run=True, on_report=seen.append
    )
    assert seen == [report]
    latents = {"32x32": 8 * 8 * 8, "48x32": 8 * 8 * 12, "16x16": 8 * 4 * 4}
    expected = sum(2 * latents[name] * count for name, count in report.images_per_bucket.items())
    assert report.bytes == expected + 7 * 2 * (12 * 128 + 128)
    assert not (tmp_path / "latents").exists()
    assert not json.loads((tmp_path / "manifest.json").read_text())["complete"]
    build_cache(pairs, pipeline, tmp_path, EMBEDS, max_broken=0.1, progress=False)
    stored = sum(len(data) for name, data in shard_bytes(tmp_path).items() if name.startswith(("latents", "prompts")))
    assert expected < stored < report.bytes + 1200 * report.shards


def test_caches_of_other_versions_are_refused(built: tuple[Path, CacheReport, list[str]], tmp_path: Path) -> None:
    manifest = json.loads((built[0] / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ValueError, match="version 99; this release reads 1"):
        load_preferences(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not the manifest of a latent cache"):
        CachedPreferences(tmp_path)
    with pytest.raises(ValueError, match="holds no latent cache"):
        CachedPreferences(tmp_path / "nowhere")


def test_lazy_images_may_be_shared_between_pairs(tmp_path: Path) -> None:
    noise = torch.randint(256, (256, 256, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "shared.png")
    for _ in range(20):
        image = Image.open(tmp_path / "shared.png")  # not loaded yet
        shared = [Preference("p", image, image, 1.0, a_name="a", b_name="a") for _ in range(16)]
        with ThreadPoolExecutor(8) as pool:
            entries = list(pool.map(partial(describe_pair, shared), range(16)))
        assert {(entry["broken"], entry["a_width"], entry["b_height"]) for entry in entries} == {("", 256, 256)}
