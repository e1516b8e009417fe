"""Builds a cache and notes the batches of each rank; a job of together.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator, skip_first_batches

from dina_reward.data import BucketBatchSampler, CachedPreferences, bucketed_loader, build_cache, collate_preferences
from dina_reward.shapes import load_pipeline
from tests.data.cache_world import SETTINGS, make_pairs, write_images


PAIRS = 60
CACHE = replace(SETTINGS, prompt_embeds=True, max_sequence_length=6)


def build(images: Path, directory: Path) -> None:
    """Builds the cache of a fixed dataset."""
    pairs = make_pairs(images, PAIRS, broken=[3])
    build_cache(pairs, load_pipeline("flow"), directory, CACHE, max_broken=0.02, progress=False)


def batches(loader: Any) -> list[dict[str, Any]]:
    """Buckets and prompts of a rank's batches, which stand for the pairs."""
    return [{"shape": list(batch["chosen"].shape), "sum": float(batch["chosen"].sum())} for batch in loader]


def work(output: Path) -> None:
    accelerator = Accelerator()
    if accelerator.is_main_process:
        write_images(output / "images", PAIRS + 4)
    accelerator.wait_for_everyone()
    build(output / "images", output / "cache")
    rows = CachedPreferences(output / "cache")
    rank, world = accelerator.process_index, accelerator.num_processes

    def loader() -> Any:
        sampler = BucketBatchSampler(rows.bucket_of, 3, seed=5, num_replicas=world, rank=rank)
        return bucketed_loader(rows, sampler, collate_fn=collate_preferences)

    first = loader()
    epochs = [batches(first), batches(first)]
    resumed = skip_first_batches(loader(), 4)
    resumed.set_epoch(1)
    result = {"world": world, "epochs": epochs, "resumed": batches(resumed)}
    (output / f"rank{rank}.json").write_text(json.dumps(result))
