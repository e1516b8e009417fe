"""How well a pipeline of the shapes world draws what it is told, in the oracle's eyes.

`python -m dina_reward.shapes.evaluation` prints the figures of the shipped pipeline; with `--lora DIRECTORY`, aligned.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.generator import Generator
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.alignment.sampling.solver import check_order

from .autoencoder import decode_latents
from .oracle import Oracle, OracleScores
from .prompts import ATTRIBUTES, sample_prompts
from .renderer import IMAGE_SIZE
from .text import MAX_PROMPT_TOKENS
from .worlds import WORLDS, world_of


@dataclass(frozen=True)
class PipelineEvaluation:
    """Samples of a pipeline and what the oracle says about them.

    Args:
        prompts (list[str]): the prompt of each sample.
        images (Tensor): images in [0, 1], shape (count, 3, 32, 32).
        scores (OracleScores): the oracle's scores of the images.
    """

    prompts: list[str]
    images: Tensor
    scores: OracleScores

    def __str__(self) -> str:
        right = self.scores.attributes.float().mean(dim=0).tolist()
        parts = ", ".join(f"{name} {value:.3f}" for name, value in zip(ATTRIBUTES, right, strict=True))
        return (
            f"{len(self.prompts)} samples: fit {self.scores.fit.mean():.3f} ({parts}), "
            f"cleanness {self.scores.cleanness.mean():.3f}, quality {self.scores.quality.mean():.3f}"
        )


def evaluate_pipeline(
    pipeline: Any,
    split: str = "held_out",
    count: int = 480,
    num_inference_steps: int | None = None,
    eta: float = 0.0,
    seed: int = 0,
    solver_order: int = 1,
) -> PipelineEvaluation:
    """Sample `count` images for the prompts of a split, without guidance, and let the oracle judge them.

    Args:
        pipeline (Any): what to evaluate.
        split (str): "train" or "held_out".
        count (int): number of samples, dealt evenly to the prompts.
        num_inference_steps (int): sampler steps; the world's own number by default.
        eta (float): share of fresh noise in each step.
        seed (int): seeds prompts and noise.
        solver_order (int): 1 as the pipeline samples; 2 for DPM-Solver++(2M), which takes no `eta`.

    Raises:
        ValueError: `solver_order` is neither 1 nor 2, or 2 with an `eta`.
    """
    check_order(solver_order)
    if solver_order == 2 and eta:
        raise ValueError(f"steps of second order are deterministic, got eta {eta}; set one of them back")
    prompts = sample_prompts(count, split, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    if solver_order == 1:
        latents = world_of(pipeline).sample(pipeline, prompts, generator, eta=eta, **steps)
    else:
        latents = _sample_second_order(pipeline, prompts, generator, **steps)
    images = decode_latents(pipeline.vae, latents)
    return PipelineEvaluation(prompts=prompts, images=images, scores=Oracle()(images, prompts))


@torch.no_grad()
def _sample_second_order(
    pipeline: Any, prompts: list[str], generator: torch.Generator, num_inference_steps: int = 10
) -> Tensor:
    model = Generator(pipeline, max_sequence_length=MAX_PROMPT_TOKENS)
    shape = model.latent_shape(IMAGE_SIZE, IMAGE_SIZE)
    initial = torch.randn((len(prompts), *shape), generator=generator)
    predict = model.bind(model.encode(prompts, initial.device), None)
    return sample(predict, initial, model.sampler(num_inference_steps, shape), solver_order=2).latents


def main() -> None:
    from .shipped import load_pipeline

    parser = argparse.ArgumentParser(description="Let the oracle judge the shipped pipeline.")
    parser.add_argument("--world", choices=[world.name for world in WORLDS], default="flow", help="which generator")
    parser.add_argument("--lora", type=Path, help="directory of a LoRA that an alignment run has written")
    parser.add_argument("--count", type=int, default=480, help="samples for each split")
    parser.add_argument("--seed", type=int, default=0, help="seeds prompts and noise")
    parser.add_argument("--steps", type=int, help="sampler steps; the world's own number by default")
    parser.add_argument("--solver-order", type=int, default=1, help="1: Euler or DDIM, 2: DPM-Solver++(2M)")
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.world)
    if arguments.lora is not None:
        pipeline.load_lora_weights(arguments.lora)
    settings = {"seed": arguments.seed, "num_inference_steps": arguments.steps, "solver_order": arguments.solver_order}
    for split in ("train", "held_out"):
        print(f"{split}: {evaluate_pipeline(pipeline, split, arguments.count, **settings)}")


if __name__ == "__main__":
    main()
