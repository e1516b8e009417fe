"""Builds everything that the shapes world ships: `python -m dina_reward.shapes.build --output DIR`.

| stage | makes | from |
|---|---|---|
| vae | `vae/` | renders |
| generator | `flow/`, the flow-matching pipeline | `vae/` |
| aligned | `flow-aligned/`, samples of generators aligned with provisional rewards | `flow/` |
| preferences | `flow-preferences/train.safetensors`, `flow-preferences/held_out.safetensors` | `flow/`, `flow-aligned/` |
| reward | `flow-reward/` | `flow/`, `flow-preferences/` |
| ddpm-generator | `ddpm/`, the DDPM pipeline | `vae/` |
| ddpm-aligned | `ddpm-aligned/` | `ddpm/` |
| ddpm-preferences | `ddpm-preferences/` | `ddpm/`, `ddpm-aligned/` |
| ddpm-reward | `ddpm-reward/` | `ddpm/`, `ddpm-preferences/` |

The package ships the pipelines, the rewards and `held_out.safetensors` of the aligned samples.

A finished stage is kept: run the command again to continue after an interruption, or name a stage with `--force` to
make it anew.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

from dina_reward.checkpoints.atomic import atomic_directory, atomic_file
from dina_reward.evaluation import calibrate_variance
from dina_reward.families import family_of
from dina_reward.reward import LatentReward

from .attack import attack_reward
from .autoencoder import reconstruction_psnr, train_autoencoder
from .evaluation import evaluate_pipeline
from .portable import make_portable
from .preferences import PAIR_WEIGHTS, PreferencePairs, build_pool, sample_pairs
from .prompts import sample_scenes
from .renderer import render
from .reward import evaluate_reward, train_reward
from .worlds import WORLDS, World


POOL_SIZES = {"train": 4096, "held_out": 768}
"""Latents of each of the five sources."""

PAIR_COUNTS = {"train": 120000, "held_out": 4000}

ROUNDS = {"flow": 2, "ddpm": 1}
"""Provisional rewards that are trained and hacked, each with the samples that hacked the ones before."""

PROVISIONAL_STEPS, PROVISIONAL_POOL, PROVISIONAL_PAIRS = 800, 1024, 40000
"""Optimizer steps of a provisional reward; latents of each source and pairs that it is trained on."""

ALIGNED_COUNTS = {"train": 1024, "held_out": 256}
"""Samples of aligned generators that each round gives."""

HARD_KINDS = {"any": 0.2, "attribute": 0.65, "cleanness": 0.15}
"""Share of the kinds of pairs where outlines are what is left to learn, see `PAIR_WEIGHTS`."""


@dataclass(frozen=True)
class Phase:
    """One run of the learning-rate schedule of a reward, from where the phase before it ended.

    Args:
        steps: optimizer steps.
        learning_rate: the highest.
        kinds, alike_weight: how its pairs are drawn from the training latents, see `sample_pairs`.
    """

    steps: int = 3000
    learning_rate: float = 2e-3
    kinds: Mapping[str, float] = field(default_factory=lambda: PAIR_WEIGHTS)
    alike_weight: float = 1.0


PHASES = {
    "flow": (
        Phase(),
        Phase(steps=1500, learning_rate=1e-3),
        Phase(steps=1500, learning_rate=1e-3, kinds=HARD_KINDS, alike_weight=12),
        Phase(steps=1000, learning_rate=1e-3, kinds=HARD_KINDS, alike_weight=2),
        Phase(steps=1400, learning_rate=1e-3, kinds=HARD_KINDS, alike_weight=2),
        Phase(steps=1500, learning_rate=1e-3, kinds=HARD_KINDS, alike_weight=1.5),
    ),
    "ddpm": (Phase(),),
}
"""Training of each reward. After two phases the transformer tells every two outlines apart but circles and squares, where it
is right half of the time; the third is mostly about these, at the cost of others, and the others bring those back."""

CALIBRATION_SEED, CALIBRATION_POOL, CALIBRATION_PAIRS = 777, 256, 4000
"""Pairs that the variance of a trained reward's likelihood is fitted to: other latents, captions of the training split."""


def build_vae(output: Path, seed: int = 0) -> None:
    """Train the autoencoder and write it to `output/vae` in half precision."""
    vae = train_autoencoder(seed=seed)
    images = render(sample_scenes(512, "held_out", seed=seed + 1), torch.Generator().manual_seed(seed + 1))
    print(f"reconstruction of held-out renders: {reconstruction_psnr(vae, images):.1f} dB")
    with atomic_directory(output / "vae") as directory:
        vae.half().save_pretrained(directory)


def build_generator(world: World, output: Path, seed: int = 0) -> None:
    """Train a generator and write its pipeline, denoiser and autoencoder in half precision."""
    vae = AutoencoderKL.from_pretrained(output / "vae")
    pipeline = world.train(vae.eval().requires_grad_(False), seed=seed, compile=True)
    print(evaluate_pipeline(pipeline, seed=seed))
    save_pipeline(pipeline, output / world.name)


def save_pipeline(pipeline: DiffusionPipeline, directory: Path) -> None:
    """Write a pipeline, denoiser and autoencoder in half precision."""
    getattr(pipeline, family_of(pipeline).denoiser_attribute).half()
    pipeline.vae.half()
    with atomic_directory(directory) as staging:
        pipeline.save_pretrained(staging)
        forget_origin(staging)
        make_portable(staging)


def forget_origin(directory: Path) -> None:
    """Remove the path that a model was loaded from out of every configuration below `directory`."""
    for path in directory.rglob("*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_aligned(world: World, output: Path, seed: int = 0) -> None:
    """Train provisional rewards, align generators with them, and write samples of these for the prompts of both splits."""
    work = output / f"{world.name}-aligned-training"
    pipeline = DiffusionPipeline.from_pretrained(output / world.name)
    found: dict[str, torch.Tensor] = {}
    for number in range(ROUNDS[world.name]):
        path = work / f"round-{number}.safetensors"
        if not path.is_file():
            round_seed = seed + 100 * (number + 1)
            pool = build_pool(pipeline, "train", PROVISIONAL_POOL, round_seed, aligned=found.get("train"))
            pairs = sample_pairs(pool, "train", PROVISIONAL_PAIRS, round_seed)
            runs = work / f"round-{number}"
            train_reward(pipeline, pairs, runs / "reward", steps=PROVISIONAL_STEPS, seed=round_seed)
            taken = attack_reward(output / world.name, runs / "reward" / "averaged", runs, ALIGNED_COUNTS, round_seed)
            with atomic_file(path) as staging:
                save_file(taken, staging)
        taken = load_file(path)
        found = {split: torch.cat([found[split], taken[split]]) if found else taken[split] for split in taken}
    with atomic_directory(output / f"{world.name}-aligned") as directory:
        for split, latents in found.items():
            save_file({"latents": latents.half()}, directory / f"{split}.safetensors")


def build_preferences(world: World, output: Path, seed: int = 0) -> None:
    """Sample, read and pair latents, and write the labelled pairs of both splits."""
    pipeline = DiffusionPipeline.from_pretrained(output / world.name)
    with atomic_directory(output / f"{world.name}-preferences") as directory:
        for offset, split in enumerate(POOL_SIZES):
            aligned = load_file(output / f"{world.name}-aligned" / f"{split}.safetensors")["latents"]
            pool = build_pool(pipeline, split, POOL_SIZES[split], seed=seed + offset, aligned=aligned)
            pairs = sample_pairs(pool, split, PAIR_COUNTS[split], seed=seed + offset)
            pairs.save(directory / f"{split}.safetensors")
            errors = (pairs.gap < 0).float().mean()
            print(f"{split}: {len(pairs)} pairs, {100 * errors:.1f} % of the labels are errors")


def train_in_phases(
    pipeline: DiffusionPipeline, pairs: PreferencePairs, phases: Sequence[Phase], runs: Path, seed: int = 0
) -> LatentReward:
    """Train a reward phase by phase; those that are complete in `runs` are kept."""
    reward, start = None, None
    for number, phase in enumerate(phases):
        drawn = pairs
        if phase.kinds != PAIR_WEIGHTS or phase.alike_weight != 1:
            drawn = sample_pairs(pairs.pool, "train", len(pairs), seed + number, phase.kinds, phase.alike_weight)
        reward = train_reward(
            *(pipeline, drawn, runs / f"phase-{number}"),
            steps=phase.steps,
            learning_rate=phase.learning_rate,
            start=start,
            seed=seed + number,
        )
        start = runs / f"phase-{number}" / "averaged"
    if reward is None:
        raise ValueError("got no phases; expected one or more.")
    return reward


def build_reward(world: World, output: Path, seed: int = 0) -> None:
    """Train a latent reward on the preferences, calibrate it on fresh pairs, print its held-out accuracy and write it."""
    pipeline = DiffusionPipeline.from_pretrained(output / world.name)
    preferences = output / f"{world.name}-preferences"
    pairs = {split: PreferencePairs.load(preferences / f"{split}.safetensors") for split in POOL_SIZES}
    reward = train_in_phases(
        pipeline, pairs["train"], PHASES[world.name], output / f"{world.name}-reward-training", seed=seed
    )
    fresh_seed = seed + CALIBRATION_SEED
    aligned = load_file(output / f"{world.name}-aligned" / "train.safetensors")["latents"]
    fresh = sample_pairs(
        build_pool(pipeline, "train", CALIBRATION_POOL, fresh_seed, aligned), "train", CALIBRATION_PAIRS, fresh_seed
    )
    print(f"variance fitted to {len(fresh)} pairs: {calibrate_variance(reward, fresh, batch_size=256)}")
    report = evaluate_reward(reward, pairs["held_out"])
    print(report.table(), report.calibration_table("0.4"), sep="\n\n")
    reward.save_pretrained(output / f"{world.name}-reward")


def _stages() -> dict[str, tuple[Callable[..., None], str]]:
    stages: dict[str, tuple[Callable[..., None], str]] = {"vae": (build_vae, "vae")}
    for world in WORLDS:
        prefix = "" if world.name == "flow" else f"{world.name}-"
        stages[f"{prefix}generator"] = (partial(build_generator, world), world.name)
        stages[f"{prefix}aligned"] = (partial(build_aligned, world), f"{world.name}-aligned")
        stages[f"{prefix}preferences"] = (partial(build_preferences, world), f"{world.name}-preferences")
        stages[f"{prefix}reward"] = (partial(build_reward, world), f"{world.name}-reward")
    return stages


STAGES = _stages()
"""Each stage's function and the directory it makes."""


def build(output: str | Path, stages: list[str], force: bool = False, seed: int = 0) -> None:
    """Run stages in order, leaving out those whose directory is there already.

    Args:
        output (str | Path): where everything goes.
        stages (list[str]): names in `STAGES`.
        force (bool): make the named stages anew even if they are there.
        seed (int): seeds every stage.
    """
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise ValueError(f"Unknown stages {', '.join(unknown)}; expected some of {', '.join(STAGES)}.")
    output = Path(output)
    for name, (function, directory) in STAGES.items():
        if name not in stages:
            continue
        if (output / directory).exists() and not force:
            print(f"{name}: {output / directory} is there already (--force makes it anew)")
            continue
        start = time.perf_counter()
        function(output, seed=seed)
        print(f"{name}: wrote {output / directory} in {time.perf_counter() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the shapes world's weights.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write to")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="what to build")
    parser.add_argument("--force", action="store_true", help="make the named stages anew even if they are there")
    parser.add_argument("--seed", type=int, default=0, help="seeds every stage")
    arguments = parser.parse_args()
    build(arguments.output, arguments.stages, force=arguments.force, seed=arguments.seed)


if __name__ == "__main__":
    main()
