"""What a linear probe reads from the blocks of the flow-matching generator: is an attribute there, and in which form?

`python -m dina_reward.shapes.probe` prints how often ridge regression on image tokens tells each attribute, from all tokens
side by side and from their average. A head that pools tokens can only use what the average shows; the rest has to be
gathered by the blocks, which is what the LoRA of a reward learns to do.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .autoencoder import encode_images
from .generator import encode_prompts, predict_velocity
from .prompts import ATTRIBUTES, sample_prompts, sample_scenes
from .renderer import render
from .shipped import quiet_pipeline, weights_dir


RIDGE = 10.0
"""Weight of the squared norm beside the squared error summed over samples, for standardised features."""


@torch.no_grad()
def image_tokens(pipeline: Any, latents: Tensor, prompts: list[str], level: float, seed: int) -> dict[int, Tensor]:
    """Image tokens after each block at a noise level, shape (count, 16, 96), by 1-based number of the block."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    noisy, text = torch.lerp(latents, noise, level), encode_prompts(pipeline, prompts)
    found: dict[int, list[Tensor]] = {}

    def keep(number: int) -> Any:
        return lambda module, inputs, output: found.setdefault(number, []).append(output[1])

    blocks = pipeline.transformer.transformer_blocks
    hooks = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks, start=1)]
    for rows in torch.arange(len(noisy)).split(256):
        predict_velocity(pipeline.transformer, noisy[rows], torch.full((len(rows),), level), text[rows])
    for hook in hooks:
        hook.remove()
    return {number: torch.cat(parts) for number, parts in found.items()}


def probe_accuracy(features: Tensor, labels: Tensor, train: int) -> float:
    """Share of the rows from `train` on that ridge regression on the rows before them gets right.

    Args:
        features: shape (count, size).
        labels: class of each row, int64, shape (count,).
        train: rows to fit.
    """
    scaled = (features - features[:train].mean(dim=0)) / (features[:train].std(dim=0) + 1e-6)
    scaled = F.pad(scaled, (0, 1), value=1.0)
    x, y = scaled[:train], F.one_hot(labels[:train]).float()
    weights = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]), x.T @ y)
    return float(((scaled[train:] @ weights).argmax(dim=1) == labels[train:]).float().mean())


def probe_table(count: int = 4000, levels: tuple[float, ...] = (0.1, 0.4), seed: int = 0) -> str:
    """Markdown table: attributes that probes on encoded renders get right, in percent, under captions that fit no better
    than by chance; all tokens side by side / their average.

    Args:
        count: renders, three quarters of them to fit.
        levels: noise levels.
        seed: of every draw.
    """
    pipeline = quiet_pipeline(weights_dir("flow"))
    scenes = sample_scenes(count, "train", seed=seed)
    latents = encode_images(pipeline.vae, render(scenes, torch.Generator().manual_seed(seed)))
    labels = torch.tensor([scene.indices for scene in scenes])
    prompts = sample_prompts(count, "train", seed=seed + 1)
    train = count * 3 // 4
    lines = [f"| level | block | {' | '.join(ATTRIBUTES)} |", "|---" * (2 + len(ATTRIBUTES)) + "|"]
    for level in levels:
        for number, tokens in image_tokens(pipeline, latents, prompts, level, seed).items():
            forms = (tokens.flatten(1), tokens.mean(dim=1))
            cells = [
                " / ".join(f"{100 * probe_accuracy(form, labels[:, place], train):.0f}" for form in forms)
                for place in range(len(ATTRIBUTES))
            ]
            lines.append(f"| {level:g} | {number} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Probe the blocks of the shipped flow-matching generator.")
    parser.add_argument("--count", type=int, default=4000, help="renders, three quarters of them to fit")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    arguments = parser.parse_args()
    print(probe_table(arguments.count, seed=arguments.seed))


if __name__ == "__main__":
    main()
