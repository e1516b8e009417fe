"""Where an iteration of the demo spends its time, by operation, on one thread.

python tests/benchmarks/bench_iteration.py
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.profiler import ProfilerActivity, profile

from dina_reward.alignment import DiffusionNFTTrainer
from dina_reward.shapes import load_pipeline, load_reward
from dina_reward.shapes.alignment import nft_config, training_prompts


KINDS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::mkldnn_convolution"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "copies": ("aten::copy_", "aten::cat"),
    "layer norms": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
}


def shares(iterations: int) -> dict[str, float]:
    """Shares of the CPU time of some iterations, by kind of operation; the rest last."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    reward = load_reward(pipeline=pipeline, share_backbone=True)
    with tempfile.TemporaryDirectory() as directory:
        args = nft_config(
            directory, iterations=iterations, eval_strategy="no", eval_on_start=False, save_strategy="no"
        )
        trainer = DiffusionNFTTrainer(pipeline, reward, args, train_dataset=training_prompts(0))
        with profile(activities=[ProfilerActivity.CPU]) as measured:
            trainer.train()
    times = {event.key: event.self_cpu_time_total for event in measured.key_averages()}
    total = sum(times.values())
    found = {kind: sum(times.get(name, 0.0) for name in names) / total for kind, names in KINDS.items()}
    return {**found, "other": 1 - sum(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2, help="that are measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind, share in shares(arguments.iterations).items():
        print(f"{kind:<16} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
