"""What the performance features of scoring are worth, as ratios within one run.

    python tests/benchmarks/bench_scoring.py --output tests/benchmarks/results

Uses the embedded world by default; pass `--reward` and `--pipeline` for real models. Writes one JSON per device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dina_reward import LatentReward


LEVELS = (0.2, 0.4, 0.6)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median duration of a call after one warm-up."""
    durations = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[1:])


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def measure(pipeline: Any, path: str, batch: int, repeats: int) -> dict[str, Any]:
    """Durations and their ratios; above 1 the feature pays."""
    standalone = LatentReward.from_pretrained(path, pipeline=pipeline)
    shared = LatentReward.from_pretrained(path, pipeline=pipeline, share_backbone=True)
    uncached = LatentReward.from_pretrained(path, pipeline=pipeline, share_backbone=True, prompt_cache_size=0)
    size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    shape = standalone.family.latent_shape(pipeline, size, size, pipeline.transformer.config)
    latents = torch.randn(batch, *shape, device=standalone.device)
    prompts = [f"a large red circle on a white background {i % 4}" for i in range(batch)]
    times = {
        "ensemble, one pass": seconds(lambda: shared(latents, prompts, noise_level=LEVELS, ensemble="mean"), repeats),
        "ensemble, three calls": seconds(lambda: [shared(latents, prompts, noise_level=u) for u in LEVELS], repeats),
        "merged LoRA": seconds(lambda: standalone(latents, prompts), repeats),
        "unmerged LoRA": seconds(lambda: shared(latents, prompts), repeats),
        "prompts encoded anew": seconds(lambda: uncached(latents, prompts), repeats),
        "VAE decode": seconds(lambda: standalone.family.decode_latents(pipeline, latents), repeats),
    }
    return {
        "device": device_name(standalone.device),
        "torch": torch.__version__,
        "dtype": str(standalone.model.dtype),
        "batch": batch,
        "seconds": times,
        "ratios": {
            "three calls / one pass": times["ensemble, three calls"] / times["ensemble, one pass"],
            "unmerged / merged": times["unmerged LoRA"] / times["merged LoRA"],
            "no prompt cache / prompt cache": times["prompts encoded anew"] / times["unmerged LoRA"],
            "VAE decode alone / scoring": times["VAE decode"] / times["merged LoRA"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reward", default="shapes", help="reward to measure")
    parser.add_argument("--pipeline", help="pipeline it belongs to; default: the embedded one")
    parser.add_argument("--batch", type=int, default=64, help="latents per call")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls, of which the median counts")
    parser.add_argument("--output", type=Path, help="directory for the JSON")
    arguments = parser.parse_args()
    if arguments.pipeline is None:
        from dina_reward.shapes import load_pipeline

        pipeline = load_pipeline()
    else:
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(arguments.pipeline)
    result = measure(pipeline, arguments.reward, arguments.batch, arguments.repeats)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in result["device"].lower()).strip("-")
        (arguments.output / f"scoring-{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
