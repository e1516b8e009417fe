"""Share of an alignment iteration that goes into the reward: latents scored directly, against decoding and a pixel reward.

    python tests/benchmarks/bench_reward_cost.py

One iteration of Flow-GRPO on the embedded world, measured in two processes: one whose reward is the shipped latent reward,
and one that decodes the same latents and scores the images with an untrained vision transformer of the same number of
parameters and tokens. Ratios are of one run of this script.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward.alignment import DiffusionGRPOTrainer
from dina_reward.shapes import load_pipeline, load_reward
from dina_reward.shapes.alignment import alignment_config, training_prompts


RESULTS = Path(__file__).parent / "results"


class PixelReward:
    """An untrained vision transformer that reads 4 x 4 patches of 8 pixels, sized to a number of parameters."""

    def __init__(self, parameters: int) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        def model(layers: int, width: int = 128) -> nn.Module:
            config = CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
            return CLIPVisionModel(config).eval()

        torch.manual_seed(0)
        sizes = {layers: sum(p.numel() for p in model(layers).parameters()) for layers in (1, 2)}
        per_layer = sizes[2] - sizes[1]
        self.model = model(max(1, round((parameters - sizes[1]) / per_layer) + 1))
        self.parameters = sum(p.numel() for p in self.model.parameters())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=2 * images - 1).pooler_output.mean(dim=1)


def measure(kind: str, batch_size: int, iterations: int) -> dict[str, Any]:
    """Runs iterations with one kind of reward and reads the trainer's own clock."""
    pipeline = load_pipeline()
    latent_reward = load_reward(pipeline=pipeline, share_backbone=True)
    size = sum(p.numel() for p in latent_reward.model.parameters())
    reward: Any = latent_reward if kind == "latent" else PixelReward(size)
    with tempfile.TemporaryDirectory() as directory:
        config = alignment_config(
            directory,
            iterations=iterations,
            per_device_train_batch_size=batch_size,
            eval_strategy="no",
            eval_on_start=False,
            disable_tqdm=True,
        )
        trainer = DiffusionGRPOTrainer(pipeline, reward, config, train_dataset=training_prompts(0))
        trainer.train()
        lines = [line for line in trainer.state.log_history if "time/reward" in line][1:]
        experience, _ = trainer.make_experience(10_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        for part in experience:
            trainer.rewards.score(
                part.rollout.latents, [{"prompt": p} for p in part.prompts], part.conditioning_rows(), list(part.rows)
            )
        seconds = time.perf_counter() - started
    reward_seconds = statistics.median(line["time/reward"] for line in lines)
    others = statistics.median(line["time/rollout"] + 2 * line["time/train"] for line in lines)
    return {
        "parameters": size if kind == "latent" else reward.parameters,
        "reward_seconds": reward_seconds,
        "share_of_iteration": reward_seconds / (reward_seconds + others),
        "scoring_alone_seconds": seconds,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_before_scoring_again_mb": before / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=96, help="samples of a micro-batch; two make an iteration")
    parser.add_argument("--iterations", type=int, default=6, help="iterations; the first is left out")
    parser.add_argument("--kind", choices=["latent", "pixel"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind is not None:
        print(json.dumps(measure(arguments.kind, arguments.batch_size, arguments.iterations)))
        return
    report: dict[str, Any] = {**vars(arguments), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    del report["kind"]
    for kind in ("latent", "pixel"):
        command = [sys.executable, __file__, "--kind", kind, "--batch-size", str(arguments.batch_size)]
        command += ["--iterations", str(arguments.iterations)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        report[kind] = json.loads(output.splitlines()[-1])
    report["time_ratio_pixel_to_latent"] = report["pixel"]["reward_seconds"] / report["latent"]["reward_seconds"]
    report["memory_difference_mb"] = report["pixel"]["peak_memory_mb"] - report["latent"]["peak_memory_mb"]
    print(json.dumps(report, indent=2))
    RESULTS.mkdir(exist_ok=True)
    name = f"reward-cost-{platform.machine().replace('_', '-')}-cpu.json"
    (RESULTS / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
