"""``manifest.json`` of a latent cache: what it was made from, so that no run continues the cache of another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dina_reward.checkpoints.atomic import atomic_file
from dina_reward.checks.stored import check_same, read_json
from dina_reward.checks.values import check_fields, fits, is_int
from dina_reward.data.arrow_files import STORED_DTYPES
from dina_reward.data.broken import BrokenRowError
from dina_reward.data.buckets import BucketRule
from dina_reward.data.cache_index import PairSource
from dina_reward.families import ModelFamily


MANIFEST_NAME = "manifest.json"
FORMAT = "dina_reward latent cache"
FORMAT_VERSION = 1
_PROBED_ROWS = 32
_REMEDY = {
    "pipeline": "Use the pipeline that the cache was begun with",
    "dataset": "Use the dataset, split, seed and filters that the cache was begun with",
    "settings": "Use the options that the cache was begun with",
}


@dataclass(frozen=True)
class CacheSettings:
    """What decides the content of a cache, apart from dataset and pipeline.

    Args:
        rule: aspect-ratio buckets.
        latent_dtype, embeds_dtype: how latents and prompt embeddings are stored: float16, bfloat16 or float32.
        prompt_embeds: whether prompt embeddings are stored too.
        max_sequence_length: token limit of prompts; ``None`` takes the pipeline's default.
        batch_size: images or prompts per call of the encoders. Batches are cut inside a shard, so what is encoded
            together does not depend on processes or interruptions; floating point results may depend on the batch
            size, which is why a cache is finished with the one it was begun with.
        images_per_shard, prompts_per_shard, pairs_per_shard: work items of a shard; a kill costs at most one shard of
            each process.
    """

    rule: BucketRule = field(default_factory=BucketRule)
    latent_dtype: str = "float16"
    embeds_dtype: str = "float16"
    prompt_embeds: bool = False
    max_sequence_length: int | None = None
    batch_size: int = 8
    images_per_shard: int = 256
    prompts_per_shard: int = 64
    pairs_per_shard: int = 512

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.rule, BucketRule):
            raise ValueError(
                f"rule must be a BucketRule, got {type(self.rule).__name__}; make one by BucketRule.of([...])"
            )
        for name in ("latent_dtype", "embeds_dtype"):
            if getattr(self, name) not in STORED_DTYPES:
                raise ValueError(f"{name} must be one of {list(STORED_DTYPES)}, got {getattr(self, name)!r}")
        for name in ("batch_size", "images_per_shard", "prompts_per_shard", "pairs_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_sequence_length is not None and not self.prompt_embeds:
            raise ValueError("max_sequence_length has no effect without prompt_embeds; leave it out")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rule"}
        rule = {"tolerance": self.rule.tolerance, "max_upscale": self.rule.max_upscale}
        return {"buckets": [str(bucket) for bucket in self.rule.buckets], **rule, **values}


def begin_manifest(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a new cache, or checks that the one at hand is of the same cache and returns it.

    Args:
        path: the file.
        content: ``pipeline``, ``dataset`` and ``settings``, compared key by key.

    Raises:
        ValueError: the directory holds something else, or a cache of another dataset, pipeline or settings.
    """
    if path.exists():
        found = read_manifest(path.parent)
        _check_same(found, content, path.parent)
        return found
    if path.parent.is_dir() and any(not entry.name.startswith(".") for entry in path.parent.iterdir()):
        raise ValueError(f"{path.parent} is not empty and no latent cache; choose another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": FORMAT, "version": FORMAT_VERSION, "complete": False, **content,
        "written_with": {name: version(name) for name in ("torch", "diffusers", "transformers", "pillow")},
    }  # fmt: skip
    write_manifest(path, manifest)
    return manifest


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest as a whole."""
    with atomic_file(path) as staging:
        staging.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads a manifest.

    Raises:
        ValueError: there is none, or it is not one of a latent cache that this version reads.
    """
    path = Path(directory, MANIFEST_NAME)
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise ValueError(f"{directory} holds no latent cache: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of a latent cache")
    if manifest.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{directory} is a latent cache of version {manifest.get('version')}; this release reads {FORMAT_VERSION}"
        )
    return manifest


def check_readable(manifest: Mapping[str, Any], directory: Path) -> None:
    """Refuses a finished cache whose manifest lacks what reading it takes, or has it of a wrong kind.

    Raises:
        ValueError: naming the entry.
    """
    settings, shapes = manifest.get("settings"), manifest.get("latent_shapes")
    facts: dict[str, Any] = {**(settings if isinstance(settings, dict) else {}), "latent_shapes": shapes}
    buckets = facts.get("buckets")
    right = {
        "buckets": fits(buckets, list[str]) and bool(buckets),
        "latent_shapes": isinstance(shapes, dict) and all(_is_shape(shapes.get(name)) for name in buckets or ()),
        "prompt_embeds": fits(facts.get("prompt_embeds"), bool),
        **{name: facts.get(name) in tuple(STORED_DTYPES) for name in ("latent_dtype", "embeds_dtype")},
        **{name: is_int(facts.get(name)) and facts[name] > 0 for name in ("images_per_shard", "prompts_per_shard")},
        "complete": fits(manifest.get("complete"), bool),
    }
    wrong = next((name for name, fine in right.items() if not fine), None)
    if wrong is not None:
        known = {**facts, "complete": manifest.get("complete")}
        raise ValueError(
            f"{directory / MANIFEST_NAME} is damaged: its {wrong} cannot be {known.get(wrong)!r:.80}; build the cache again"
        )


def _is_shape(value: Any) -> bool:
    return fits(value, list[int]) and len(value) > 1 and min(value) > 0


def is_cache(directory: Path) -> bool:
    """Whether a directory holds a latent cache, finished or not, of whatever version."""
    try:
        manifest = read_json(Path(directory, MANIFEST_NAME))
    except ValueError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], directory: Path) -> None:
    for part, remedy in _REMEDY.items():
        fault = f"{directory} holds a cache of another {part.removesuffix('s')}"
        check_same(found.get(part, {}), wanted[part], fault, f"{remedy}, or write to another directory", both=True)


def pipeline_fingerprint(pipeline: Any, family: ModelFamily, prompt_embeds: bool) -> dict[str, Any]:
    """What the latents (and prompt embeddings) depend on: configurations, and digests of weights, dtype included."""
    denoiser = getattr(pipeline, family.denoiser_attribute)
    processor = getattr(pipeline, "image_processor", None)
    result: dict[str, Any] = {
        "family": family.name,
        "latent_multiple": family.latent_multiple(denoiser.config),
        "vae_class": type(pipeline.vae).__name__,
        "vae_config": _digest_json(_public(pipeline.vae.config)),
        "vae_weights": module_digest(pipeline.vae),
        "image_processor": _digest_json(_public(getattr(processor, "config", {}))),
    }
    if prompt_embeds:
        for name, part in sorted(pipeline.components.items()):
            if name.startswith("text_encoder") and isinstance(part, nn.Module):
                result[name] = module_digest(part)
            elif name.startswith("tokenizer") and part is not None:
                result[name] = _digest_json(
                    sorted(part.get_vocab().items()) if hasattr(part, "get_vocab") else str(part)
                )
    return result


def dataset_fingerprint(preferences: PairSource) -> dict[str, Any]:
    """Number of pairs, digest of all labels where they come without images, and texts of some evenly spaced rows."""
    count = len(preferences)
    labels = getattr(preferences, "labels", None)
    digest = hashlib.sha256()
    for values in () if labels is None else labels:
        digest.update(np.ascontiguousarray(values).tobytes())
    rows = sorted({int(row) for row in np.linspace(0, count - 1, min(count, _PROBED_ROWS))})
    return {
        "pairs": count,
        "labels": digest.hexdigest(),
        "rows": _digest_json([_row_texts(preferences, row) for row in rows]),
    }


def _row_texts(preferences: PairSource, row: int) -> list[Any]:
    try:
        pair = preferences[row]
    except (BrokenRowError, OSError, SyntaxError):
        return [row, "broken"]
    return [row, pair.prompt, pair.p_a, pair.weight, pair.source, pair.group, pair.a_name, pair.b_name]


def module_digest(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and content of all tensors of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _public(config: Any) -> dict[str, Any]:
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
