"""How noisy group-relative advantages are, with the reward's noise shared inside a group or drawn for each member.

    python tests/benchmarks/bench_reward_noise.py

Samples of the embedded flow-matching generator are scored many times with fresh noise. For each way of drawing it, the
standard deviation of a member's advantage over repetitions and the correlation of one draw's advantages with those of the
mean over all repetitions and ways are printed and written to tests/benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dina_reward.alignment.objectives.advantages import compute_advantages
from dina_reward.noise.draws import fold_seed
from dina_reward.shapes import load_pipeline, load_reward, sample_latents, sample_prompts


GROUP = 12
RESULTS = Path(__file__).parent / "results"


def scores_of(reward: Any, latents: Tensor, prompts: list[str], repeats: int, shared: bool, draws: int) -> Tensor:
    """Scores of every repetition, shape ``(repeats, rows)``."""
    rows = []
    for repeat in tqdm(range(repeats), desc=f"{'shared' if shared else 'independent'} noise, {draws} draw(s)"):
        keys = [row // GROUP if shared else row for row in range(len(prompts))]
        seeds = [fold_seed(repeat, int(shared), draws, key) for key in keys]
        rows.append(reward(latents, prompts, noise_level=0.4, num_noise_samples=draws, seed=seeds))
    return torch.stack(rows)


def advantages_of(scores: Tensor) -> Tensor:
    """Group-relative advantages of each repetition, shape ``(repeats, rows)``."""
    group_ids = torch.arange(scores.shape[1]) // GROUP
    return torch.stack([compute_advantages(row, group_ids).advantages for row in scores])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=16, help="prompts")
    parser.add_argument("--repeats", type=int, default=24, help="scorings with fresh noise")
    parser.add_argument("--seed", type=int, default=0, help="seeds prompts and samples")
    arguments = parser.parse_args()
    pipeline = load_pipeline()
    reward = load_reward(pipeline=pipeline)
    prompts = [p for p in sample_prompts(arguments.groups, "held_out", seed=arguments.seed) for _ in range(GROUP)]
    latents = sample_latents(pipeline, prompts, torch.Generator().manual_seed(arguments.seed), eta=0.8)
    ways = [(shared, draws) for draws in (1, 2, 4) for shared in (True, False)]
    scores = {way: scores_of(reward, latents, prompts, arguments.repeats, *way) for way in ways}
    truth = advantages_of(torch.cat(list(scores.values())).mean(dim=0, keepdim=True))[0]
    table = []
    for (shared, draws), values in scores.items():
        advantages = advantages_of(values)
        correlation = [float(torch.corrcoef(torch.stack([row, truth]))[0, 1]) for row in advantages]
        table.append(
            {
                "noise": "shared in the group" if shared else "independent",
                "draws": draws,
                "advantage_noise_std": float(advantages.std(dim=0).square().mean().sqrt()),
                "correlation_with_mean": sum(correlation) / len(correlation),
            }
        )
        print(json.dumps(table[-1]))
    name = f"reward-noise-{platform.machine().replace('_', '-')}-cpu.json"
    report = {**vars(arguments), "group_size": GROUP, "noise_level": 0.4, "cores": os.cpu_count(), "results": table}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
