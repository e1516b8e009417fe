"""Preference pairs of latents, labelled by the oracle with a known amount of label noise.

Images come first, captions after: a pool of latents is read once by the oracle, and since the reading tells how well a
latent fits *any* caption, as many pairs as wanted can be drawn from it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .autoencoder import decode_latents, encode_images
from .degradations import degrade
from .oracle import FIT_WEIGHT, Oracle
from .prompts import ATTRIBUTES, Scene, all_scenes, sample_prompts, sample_scenes
from .renderer import render
from .worlds import world_of


LABEL_NOISE = 0.08
"""Deviation of the labeller's error in quality: P(a > b) = Phi((quality_a - quality_b) / 0.08)."""

NEGLIGIBLE_GAP = FIT_WEIGHT / len(ATTRIBUTES) / 2
"""Pairs whose qualities differ by less (half an attribute) are left out of accuracies."""

SOURCES = ("render", "degraded", "perturbed", "ode", "sde", "aligned")
"""Where latents come from: encoded renders, encoded degraded renders, either of these or samples with noise added to
the latent, samples of the generator drawn without and with fresh noise in each step, and samples of generators that have
been aligned with a reward until it was hacked."""

SOURCE_WEIGHTS = {"render": 0.15, "degraded": 0.15, "perturbed": 0.1, "ode": 0.2, "sde": 0.25, "aligned": 0.15}
"""Share of each source in the pairs."""

MATCH_WEIGHTS = {4: 0.35, 3: 0.3, 2: 0.2, 1: 0.1, 0: 0.05}
"""Share of latents that have so many of the caption's four attributes."""

PAIR_WEIGHTS = {"any": 0.3, "attribute": 0.5, "cleanness": 0.2}
"""Share of pairs of two independent draws, of two latents that differ in one attribute, which the first has right, and of
two that show the same scene and differ in cleanness alone."""

ATTRIBUTE_WEIGHTS = {"size": 1, "color": 2, "shape": 4, "background": 1}
"""How often pairs differ in which attribute: the more often, the harder it is to see. Outlines take a reward longest."""

ALIKE = {"circle", "square"}
"""Two values that are hard to tell apart: a circle and a square of one size cover nearly the same area and differ in the
corners alone. Drawn no more often than other pairs, this one stays a coin flip long after the others are told apart."""

SAME_SOURCE = 0.5
"""Chance that the two latents of a pair that is not `any` are of one source."""


_ATTRIBUTE_WEIGHTS = [ATTRIBUTE_WEIGHTS[name] for name in ATTRIBUTES]
_VALUES = list(ATTRIBUTES.values())


class PreferenceRecord(TypedDict):
    """One preference.

    `chosen` and `rejected` are scaled latents of shape (8, 8, 8); `p_chosen` is the probability with which the
    labeller prefers `chosen`, below one half where the label is an error; `gap` is the quality of `chosen` minus that
    of `rejected`; `kind` names the sources of the two, for example "sde-render"; `differs` says where the two differ in
    what the caption asks for: one attribute, "several", or, where both are right in the same, "cleanness"; `outlines` names
    the two outlines where they are all that differs, as in "circle, square", and is "alike" elsewhere.
    """

    prompt: str
    chosen: Tensor
    rejected: Tensor
    p_chosen: float
    gap: float
    kind: str
    differs: str
    outlines: str


@dataclass(frozen=True)
class LatentPool:
    """Latents that the oracle has read.

    Args:
        latents (Tensor): scaled latents, shape (count, 8, 8, 8).
        indices (Tensor): attributes that the oracle reads, as indices into `ATTRIBUTES`, shape (count, 4).
        cleanness (Tensor): the oracle's cleanness, shape (count,).
        source (Tensor): index into `SOURCES`, shape (count,).
    """

    latents: Tensor
    indices: Tensor
    cleanness: Tensor
    source: Tensor

    def quality(self, rows: Tensor, scenes: Tensor) -> Tensor:
        """The oracle's quality of the latents `rows` for scenes given as attribute indices (len(rows), 4)."""
        fit = (self.indices[rows] == scenes).float().mean(dim=1)
        return FIT_WEIGHT * fit + (1 - FIT_WEIGHT) * self.cleanness[rows]


@dataclass(frozen=True)
class PreferencePairs:
    """Labelled pairs over a pool of latents: a sequence of `PreferenceRecord`.

    Args:
        latents (Tensor): the pool, shape (pool_size, 8, 8, 8).
        chosen (Tensor): row of each chosen latent, shape (count,).
        rejected (Tensor): row of each rejected latent, shape (count,).
        scenes (Tensor): the scene of each caption as attribute indices, shape (count, 4).
        gap (Tensor): quality of the chosen minus quality of the rejected latent, shape (count,).
        source (Tensor): index into `SOURCES` for each latent of the pool, shape (pool_size,).
        indices (Tensor): attributes that the oracle reads in each latent of the pool, shape (pool_size, 4).
        cleanness (Tensor): the oracle's cleanness of each latent of the pool, shape (pool_size,).
    """

    latents: Tensor
    chosen: Tensor
    rejected: Tensor
    scenes: Tensor
    gap: Tensor
    source: Tensor
    indices: Tensor
    cleanness: Tensor

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> PreferenceRecord:
        chosen, rejected = int(self.chosen[index]), int(self.rejected[index])
        return PreferenceRecord(
            prompt=Scene.from_indices(self.scenes[index].tolist()).caption,
            chosen=self.latents[chosen],
            rejected=self.latents[rejected],
            p_chosen=float(preference_probability(self.gap[index])),
            gap=float(self.gap[index]),
            kind="-".join(SOURCES[source] for source in self.source[[chosen, rejected]].tolist()),
            differs=self.differs(index),
            outlines=self.outlines(index),
        )

    def differs(self, index: int) -> str:
        """Where the latents of a pair differ in what the caption asks for, see `PreferenceRecord`."""
        chosen, rejected = (
            self.indices[int(side[index])] == self.scenes[index] for side in (self.chosen, self.rejected)
        )
        names = [name for name, differ in zip(ATTRIBUTES, (chosen != rejected).tolist(), strict=True) if differ]
        return "cleanness" if not names else names[0] if len(names) == 1 else "several"

    def outlines(self, index: int) -> str:
        """The two outlines of a pair that differs in nothing else, see `PreferenceRecord`."""
        if self.differs(index) != "shape":
            return "alike"
        place = list(ATTRIBUTES).index("shape")
        shown = sorted(int(self.indices[int(side[index]), place]) for side in (self.chosen, self.rejected))
        return ", ".join(ATTRIBUTES["shape"][value] for value in shown)

    def __iter__(self) -> Iterator[PreferenceRecord]:
        return (self[index] for index in range(len(self)))

    @property
    def pool(self) -> LatentPool:
        """The latents that the pairs were drawn from, to draw others."""
        return LatentPool(self.latents, self.indices, self.cleanness, self.source)

    def save(self, path: str | Path) -> None:
        """Write all tensors to one safetensors file."""
        save_file({name: tensor.contiguous() for name, tensor in vars(self).items()}, path)

    @classmethod
    def load(cls, path: str | Path) -> PreferencePairs:
        """Read what `save` wrote."""
        return cls(**load_file(path))


def preference_probability(gap: Tensor) -> Tensor:
    """Phi(gap / 0.08): how often the labeller prefers a latent whose quality is higher by `gap`."""
    return torch.special.ndtr(gap / LABEL_NOISE)


PAIRS_PER_LATENT = 15
"""Pairs that `fresh_preferences` draws for each latent of a source."""


def build_pool(pipeline: Any, split: str, count: int, seed: int, aligned: Tensor | None = None) -> LatentPool:
    """Make latents of every source in equal numbers and read them.

    Args:
        pipeline (StableDiffusion3Pipeline or StableDiffusionPipeline): gives the autoencoder and the samples.
        split (str): "train" or "held_out", which scenes are rendered and which prompts are sampled.
        count (int): latents of each source.
        seed (int): seeds every draw.
        aligned (Tensor): latents of aligned generators, the pool's source "aligned", shape (any_number, 8, 8, 8).
    """
    world, generator = world_of(pipeline), torch.Generator().manual_seed(seed)
    images = render(sample_scenes(2 * count, split, seed=seed), generator)
    spoiled = degrade(images[count:], torch.rand(count, generator=generator), generator)
    prompts = sample_prompts(2 * count, split, seed=seed)
    latents = {
        "render": encode_images(pipeline.vae, images[:count]),
        "degraded": encode_images(pipeline.vae, spoiled),
        "ode": world.sample(pipeline, prompts[:count], generator),
        "sde": world.sample(pipeline, prompts[count:], generator, eta=world.eta),
    }
    rows = torch.randperm(4 * count, generator=generator)[:count]
    latents["perturbed"] = _perturb(torch.cat(list(latents.values()))[rows], generator)
    latents["aligned"] = torch.empty(0, *latents["ode"].shape[1:]) if aligned is None else aligned.float()
    pool = torch.cat([latents[source] for source in SOURCES])
    reading = Oracle().read(decode_latents(pipeline.vae, pool))
    counts = torch.tensor([len(latents[source]) for source in SOURCES])
    return LatentPool(
        latents=pool,
        indices=reading.indices,
        cleanness=reading.cleanness,
        source=torch.arange(len(SOURCES)).repeat_interleave(counts),
    )


def sample_pairs(
    pool: LatentPool,
    split: str,
    count: int,
    seed: int,
    kinds: Mapping[str, float] = MappingProxyType(PAIR_WEIGHTS),
    alike_weight: float = 1.0,
) -> PreferencePairs:
    """Draw captions of a split and two latents for each, and let the noisy labeller choose.

    Args:
        pool (LatentPool): the latents.
        split (str): "train" or "held_out", where captions come from.
        count (int): number of pairs.
        seed (int): seeds every draw.
        kinds (Mapping[str, float]): weights of the kinds of pairs, see `PAIR_WEIGHTS`.
        alike_weight (float): how much more often two outlines that look `ALIKE` make a pair than two others do.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    captions = sample_scenes(count, split, seed=seed)
    buckets = _Buckets(pool, alike_weight)
    drawn = rng.choices(list(kinds), list(kinds.values()), k=count)
    first, second = torch.tensor(
        [buckets.draw_two(scene, kind, rng) for scene, kind in zip(captions, drawn, strict=True)]
    ).unbind(1)
    scenes = torch.tensor([scene.indices for scene in captions])
    gap = pool.quality(first, scenes) - pool.quality(second, scenes)
    first_wins = torch.rand(count, generator=generator) < preference_probability(gap)
    return PreferencePairs(
        latents=pool.latents,
        chosen=torch.where(first_wins, first, second),
        rejected=torch.where(first_wins, second, first),
        scenes=scenes,
        gap=torch.where(first_wins, gap, -gap),
        source=pool.source,
        indices=pool.indices,
        cleanness=pool.cleanness,
    )


class _Buckets:
    """The rows of a pool by source and by the scene that the oracle reads."""

    def __init__(self, pool: LatentPool, alike_weight: float) -> None:
        self._alike_weight = alike_weight
        self._indices = [tuple(row) for row in pool.indices.tolist()]
        self._source = [SOURCES[source] for source in pool.source.tolist()]
        self._rows: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for row, key in enumerate(zip(self._source, self._indices, strict=True)):
            self._rows.setdefault(key, []).append(row)
        scenes = [scene.indices for scene in all_scenes()]
        self._shown = {
            (scene, matches): [shown for shown in scenes if _count_matches(scene, shown) == matches]
            for scene in scenes
            for matches in range(len(ATTRIBUTES) + 1)
        }
        present = set(self._source)
        self._weights = {source: weight for source, weight in SOURCE_WEIGHTS.items() if source in present}

    def draw_two(self, scene: Scene, kind: str, rng: random.Random) -> tuple[int, int]:
        """Two different rows; where the pool has no partner for the first, both are drawn again."""
        changed = rng.choices(range(len(ATTRIBUTES)), _ATTRIBUTE_WEIGHTS)[0] if kind == "attribute" else None
        while True:
            first = self._draw(scene, rng)
            second = self._draw(scene, rng) if kind == "any" else self._partner(first, scene, changed, rng)
            if second is not None and second != first:
                return first, second

    def _draw(self, scene: Scene, rng: random.Random) -> int:
        """A row by `SOURCE_WEIGHTS` and `MATCH_WEIGHTS`; where the pool has none for the draw, draw again."""
        while True:
            (matches,) = rng.choices(list(MATCH_WEIGHTS), list(MATCH_WEIGHTS.values()))
            rows = self._rows.get((self._draw_source(rng), rng.choice(self._shown[scene.indices, matches])))
            if rows:
                return rng.choice(rows)

    def _draw_source(self, rng: random.Random) -> str:
        return rng.choices(list(self._weights), list(self._weights.values()))[0]

    def _partner(self, first: int, scene: Scene, changed: int | None, rng: random.Random) -> int | None:
        """A row that shows what `first` shows, but for the attribute `changed`, which `first` has to have right."""
        shown = list(self._indices[first])
        if changed is not None:
            right = scene.indices[changed]
            if shown[changed] != right:
                return None
            others = [value for value in range(len(_VALUES[changed])) if value != right]
            shown[changed] = rng.choices(others, [self._counterpart(changed, right, value) for value in others])[0]
        source = self._source[first] if rng.random() < SAME_SOURCE else self._draw_source(rng)
        rows = self._rows.get((source, tuple(shown)))
        return rng.choice(rows) if rows else None

    def _counterpart(self, attribute: int, right: int, wrong: int) -> float:
        """How often a wrong value is drawn beside the right one, against 1 for values that are easily told apart."""
        values = _VALUES[attribute]
        return self._alike_weight if {values[right], values[wrong]} == ALIKE else 1.0


def fresh_preferences(pipeline: Any, split: str, count: int, seed: int) -> PreferencePairs:
    """Preferences made on the spot, as the shipped rewards were trained on: fresh latents, and pairs of them.

    Args:
        pipeline (StableDiffusion3Pipeline or StableDiffusionPipeline): gives the latents.
        split (str): "train", "held_out", or "test", which is "held_out".
        count (int): number of pairs.
        seed (int): seeds every draw.
    """
    split = "held_out" if split == "test" else split
    pool = build_pool(pipeline, split, max(count // PAIRS_PER_LATENT, 64), seed)
    return sample_pairs(pool, split, count, seed)


def _count_matches(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return sum(a == b for a, b in zip(first, second, strict=True))


def _perturb(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Add white noise of a random deviation up to 0.8 to scaled latents."""
    deviation = 0.8 * torch.rand(len(latents), 1, 1, 1, generator=generator)
    return latents + deviation * torch.randn(latents.shape, generator=generator)
