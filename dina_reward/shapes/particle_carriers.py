"""Which samplers can carry particles: how much variance each leaves among the samples of a prompt, coarse and fine.

A step of coefficients-preserving sampling (CPS) rebuilds the state from the predicted clean latent, so that of independent
Gaussian data it loses variance wherever fresh noise replaces kept noise. `python -m dina_reward.shapes.particle_carriers`
measures what that means on real rollouts of the flow-matching generator, relative to a longer deterministic rollout.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dina_reward.alignment.generator import Generator
from dina_reward.alignment.sampling.rollout import sample
from dina_reward.alignment.sampling.seeding import Stream, noise_by_row
from dina_reward.noise.draws import fold_seed
from dina_reward.shapes.alignment import held_out_prompts
from dina_reward.shapes.autoencoder import decode_latents
from dina_reward.shapes.oracle import Oracle
from dina_reward.shapes.shipped import load_pipeline
from dina_reward.shapes.text import MAX_PROMPT_TOKENS


Kind = Literal["flow_sde", "dance_sde", "cps"]

STEPS, REFERENCE = 10, "ODE, 30 steps"
CARRIERS: dict[str, tuple[int, Kind, float, int]] = {
    REFERENCE: (30, "cps", 0.0, 0),
    "ODE": (STEPS, "cps", 0.0, 0),
    "Flow-SDE .7, then 3 ODE steps": (STEPS, "flow_sde", 0.7, 7),
    "Flow-SDE .7": (STEPS, "flow_sde", 0.7, 9),
    "CPS .8 in the first third": (STEPS, "cps", 0.8, 3),
    "CPS .8": (STEPS, "cps", 0.8, 9),
}
"""Steps, kind and strength of the stochastic ones, and how many of them are stochastic, from the first."""


@torch.no_grad()
def roll_out(generator: Generator, prompts: Sequence[str], carrier: str, seed: int) -> Tensor:
    """One sample per prompt, shape ``(prompts, 8, 8, 8)``."""
    steps, kind, eta, count = CARRIERS[carrier]
    shape, device = generator.latent_shape(32, 32), torch.device("cpu")
    rows = range(len(prompts))
    initial = noise_by_row([fold_seed(seed, Stream.INITIAL_LATENTS, row) for row in rows], shape)
    noise = noise_by_row([fold_seed(seed, Stream.STEP_NOISE, row) for row in rows], (count, *shape)) if count else None
    predict = generator.bind(generator.encode(prompts, device), None)
    sampler = generator.sampler(steps, shape, sde_type=kind, eta=eta)
    return sample(predict, initial, sampler, stochastic=range(count), trained=(), step_noise=noise).latents


def variances(latents: Tensor, copies: int) -> tuple[float, float]:
    """Variance inside prompts of the means of 2 x 2 patches, and of what is left, each averaged over elements and prompts.

    Args:
        latents (`Tensor`): shape ``(prompts * copies, channels, height, width)``, samples of a prompt side by side.
        copies: samples per prompt.
    """
    coarse = F.avg_pool2d(latents, 2)
    fine = latents - F.interpolate(coarse, scale_factor=2, mode="nearest")
    inside = [part.unflatten(0, (-1, copies)).var(dim=1).mean() for part in (coarse, fine)]
    return float(inside[0]), float(inside[1])


def measure(prompts: int, copies: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Coarse and fine variance of every carrier relative to the reference, and what the oracle says.

    Args:
        prompts: different prompts.
        copies: samples of each.
        seed: of all draws.
    """
    pipeline = load_pipeline("flow")
    generator = Generator(pipeline, max_sequence_length=MAX_PROMPT_TOKENS)
    texts, oracle = [text for text in held_out_prompts()[:prompts] for _ in range(copies)], Oracle()
    found: dict[str, dict[str, float]] = {}
    reference: tuple[float, float] = (1.0, 1.0)
    for name in CARRIERS:
        latents = roll_out(generator, texts, name, seed)
        own = variances(latents, copies)
        reference = own if name == REFERENCE else reference
        scores = oracle(decode_latents(pipeline.vae, latents), texts)
        found[name] = {
            "coarse": own[0] / reference[0],
            "fine": own[1] / reference[1],
            "fit": float(scores.fit.mean()),
            "cleanness": float(scores.cleanness.mean()),
        }
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """As it stands in the documentation."""
    lines = ["| sampler | coarse variance | fine variance | fit | cleanness |", "|---|---|---|---|---|"]
    for name, figure in found.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in figure.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the variance that samplers leave in the data.")
    parser.add_argument("--prompts", type=int, default=12, help="different prompts")
    parser.add_argument("--copies", type=int, default=8, help="samples per prompt")
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    arguments = parser.parse_args()
    print(table(measure(arguments.prompts, arguments.copies, arguments.seed)))


if __name__ == "__main__":
    main()
