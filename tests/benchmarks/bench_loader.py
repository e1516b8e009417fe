"""Time that a reward's training step waits for the latent cache, against the time of the step itself.

    python tests/benchmarks/bench_loader.py

The embedded world's recipe (four blocks, LoRA of rank 32, 64 pairs per step) on a cache of rendered images and of their
prompts' embeddings. Batches are read in the training process, without loader workers, so all of it is waiting.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dina_reward import LatentReward, LatentRewardConfig
from dina_reward.data import (
    BucketBatchSampler,
    BucketRule,
    CachedPreferences,
    CacheSettings,
    Preference,
    bucketed_loader,
    build_cache,
    collate_preferences,
)
from dina_reward.modeling import default_lora_config
from dina_reward.modeling.heads.config import RewardHeadConfig
from dina_reward.shapes import load_pipeline, render, sample_prompts
from dina_reward.training import LatentRewardTrainer, LatentRewardTrainingConfig


RESULTS = Path(__file__).parent / "results"


def image_pairs(count: int) -> list[Preference]:
    """Pairs of rendered images; neighbours share an image."""
    prompts = sample_prompts(count + 1, "train", seed=0)
    pixels = (255 * render(prompts, torch.Generator().manual_seed(0))).round().byte().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(image) for image in pixels]
    return [
        Preference(prompts[i], images[i], images[i + 1], p_a=0.9, a_name=str(i), b_name=str(i + 1))
        for i in range(count)
    ]


def new_trainer(pipeline: Any, directory: str) -> LatentRewardTrainer:
    """The recipe's reward and trainer."""
    config = LatentRewardConfig(
        family="sd3", num_layers=4, visual_taps=(2, 3, 4), head=RewardHeadConfig(), max_sequence_length=6
    )
    lora = default_lora_config(config, rank=32, alpha=64)
    reward = LatentReward.from_config(config, pipeline=pipeline, lora_config=lora, seed=0)
    args = LatentRewardTrainingConfig(directory, per_device_train_batch_size=64, report_to="none", use_cpu=True)
    return LatentRewardTrainer(reward, args)


def clock() -> np.ndarray:
    """Wall time, and CPU time of this process, which other programs on the machine disturb less."""
    return np.array([time.perf_counter(), time.process_time()])


def measure(pairs: int, batch_size: int, steps: int) -> dict[str, Any]:
    """Builds a cache, trains on it, and reads it at random."""
    pipeline = load_pipeline("flow")
    settings = CacheSettings(BucketRule.of(("32x32",)), prompt_embeds=True, max_sequence_length=6)
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        report = build_cache(image_pairs(pairs), pipeline, directory, settings, progress=False)
        build_seconds = time.perf_counter() - started
        rows = CachedPreferences(directory)
        sampler = BucketBatchSampler(rows.bucket_of, batch_size, seed=0)
        loader = bucketed_loader(rows, sampler, collate_fn=collate_preferences)
        trainer = new_trainer(pipeline, directory + "/trainer")
        optimizer = torch.optim.AdamW([p for p in trainer.reward.model.parameters() if p.requires_grad], lr=1e-4)
        waits, trained = [], []
        batches = iter(loader)
        for _ in range(steps + 2):
            begin = clock()
            batch = next(batches)
            loaded = clock()
            trainer.compute_loss(trainer.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            waits.append(loaded - begin)
            trained.append(clock() - loaded)
        order = random.Random(0).choices(range(len(rows)), k=2000)
        begin = time.perf_counter()
        for index in order:
            rows[index]
        row_seconds = (time.perf_counter() - begin) / len(order)
    wait, step = (np.median(np.stack(times[2:]), axis=0) for times in (waits, trained))
    return {
        "pairs": report.pairs,
        "images": report.images,
        "build_seconds": build_seconds,
        "loader_seconds_per_step": wait[0],
        "training_seconds_per_step": step[0],
        "loader_share_of_step": wait[0] / step[0],
        "loader_share_of_step_in_cpu_time": wait[1] / step[1],
        "random_row_seconds": row_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="measured steps, after two that are not")
    arguments = parser.parse_args()
    machine = {"device": f"{platform.machine()} cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    report = {**vars(arguments), **machine, **measure(arguments.pairs, arguments.batch_size, arguments.steps)}
    print(json.dumps(report, indent=2))
    RESULTS.mkdir(exist_ok=True)
    name = f"loader-{platform.machine().replace('_', '-')}-cpu.json"
    (RESULTS / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
