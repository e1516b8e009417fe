"""Manifests of finished caches that do not say what reading takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dina_reward.data import CachedPreferences
from dina_reward.data.cache_manifest import FORMAT, FORMAT_VERSION


SETTINGS = {
    "buckets": ["32x32"],
    "latent_dtype": "float16",
    "embeds_dtype": "float16",
    "prompt_embeds": False,
    "images_per_shard": 8,
    "prompts_per_shard": 8,
}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("buckets", []),
        ("buckets", "32x32"),
        ("buckets", [32]),
        ("latent_dtype", ["float16"]),
        ("latent_dtype", "float8"),
        ("embeds_dtype", None),
        ("prompt_embeds", "no"),
        ("images_per_shard", 0),
        ("images_per_shard", True),
        ("prompts_per_shard", 1.5),
        ("latent_shapes", None),
        ("latent_shapes", {"32x32": [4, 0, 4]}),
        ("latent_shapes", {"64x64": [4, 4, 4]}),
        ("complete", None),
    ],
)
def test_damaged_manifests_are_refused_by_entry(tmp_path: Path, entry: str, value: Any) -> None:
    whole: dict[str, Any] = {"format": FORMAT, "version": FORMAT_VERSION, "complete": True, "settings": SETTINGS}
    whole["latent_shapes"] = {"32x32": [4, 4, 4]}
    damaged = {**whole, entry: value} if entry in whole else {**whole, "settings": {**SETTINGS, entry: value}}
    (tmp_path / "manifest.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=rf"manifest\.json is damaged: its {entry} cannot be"):
        CachedPreferences(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"pairs\.arrow is missing or damaged"):
        CachedPreferences(tmp_path)


@pytest.mark.parametrize("bucket", ["../../x", "/etc", "32x32/../..", ""])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path: Path, bucket: str) -> None:
    settings = {**SETTINGS, "buckets": [bucket]}
    manifest = {"format": FORMAT, "version": FORMAT_VERSION, "complete": True, "settings": settings}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "latent_shapes": {bucket: [4, 4, 4]}}))
    with pytest.raises(ValueError, match="a bucket is written WIDTHxHEIGHT"):
        CachedPreferences(tmp_path)
