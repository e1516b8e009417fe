"""The oracle: reads an image of the shapes world and says how well it fits a caption and how clean it is.

`python -m dina_reward.shapes.oracle` prints how often it reads clean and degraded renders right.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .degradations import DEGRADATIONS, degrade
from .prompts import ATTRIBUTES, BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, all_scenes, as_scene
from .renderer import IMAGE_SIZE, MAX_OFFSET, RADIUS_RANGES, Placement, compose, coverage, palette, render


FIT_WEIGHT = 0.7
"""Weight of fit in quality; cleanness has the rest, so that all of it is worth nearly two attributes of four."""

RESIDUAL_SCALE = 0.1
"""Root-mean-square deviation from the nearest render at which cleanness is one half."""

RADIUS_STEP = 0.75

POOLING = 2
"""The grid search compares images and templates averaged over 2x2 pixels, which is four times faster."""


@dataclass(frozen=True)
class Reading:
    """What the oracle sees in a batch of images.

    Args:
        indices (Tensor): value of each attribute as index into `ATTRIBUTES`, int64, shape (batch_size, 4).
        residual (Tensor): root-mean-square pixel deviation from the nearest render, shape (batch_size,).
    """

    indices: Tensor
    residual: Tensor

    @property
    def scenes(self) -> list[Scene]:
        """The scenes that the images show."""
        return [Scene.from_indices(row) for row in self.indices.tolist()]

    @property
    def cleanness(self) -> Tensor:
        """1 / (1 + (residual / 0.1)^2): 1 for a perfect render, shape (batch_size,)."""
        return 1 / (1 + (self.residual / RESIDUAL_SCALE) ** 2)


@dataclass(frozen=True)
class OracleScores:
    """How good images are for their captions; all values lie in [0, 1].

    Args:
        attributes (Tensor): whether size, color, shape and background are right, bool, shape (batch_size, 4).
        cleanness (Tensor): how near the image is to a clean render of anything, shape (batch_size,).
    """

    attributes: Tensor
    cleanness: Tensor

    @property
    def fit(self) -> Tensor:
        """Share of the four attributes that are right, shape (batch_size,)."""
        return self.attributes.float().mean(dim=1)

    @property
    def quality(self) -> Tensor:
        """0.7 * fit + 0.3 * cleanness, which labels the preference pairs, shape (batch_size,)."""
        return FIT_WEIGHT * self.fit + (1 - FIT_WEIGHT) * self.cleanness


class Oracle:
    """Reads images by analysis through synthesis: it finds the render with the least squared error.

    reading = argmin over (size, color, shape, background, center, radius) of |image - render|^2

    Centres and radii are searched on a grid (1 and 3/4 pixel), at half resolution, and then refined by Gauss-Newton
    steps. There are no learned weights and no random draws.

    Example:
        oracle = Oracle()
        scores = oracle(images, ["a large red circle on a white background"] * len(images))
        print(scores.fit.mean(), scores.cleanness.mean(), scores.quality.mean())
    """

    def __init__(self) -> None:
        offsets = torch.arange(-MAX_OFFSET, MAX_OFFSET + 1)
        radii = {size: torch.arange(low, high + 1e-6, RADIUS_STEP) for size, (low, high) in RADIUS_RANGES.items()}
        grid = [
            (size, shape, float(radius), float(x), float(y))
            for size, shape in itertools.product(range(len(SIZES)), range(len(SHAPES)))
            for radius, x, y in itertools.product(radii[SIZES[size]], offsets, offsets)
        ]
        columns = torch.tensor(grid).unbind(1)
        self._size, self._shape = columns[0].long(), columns[1].long()
        self._placement = Placement(center=torch.stack(columns[3:], dim=1), radius=columns[2])
        self._templates = F.avg_pool2d(coverage(self._shape, self._placement), POOLING).flatten(1)
        pairs = list(itertools.product(COLORS, BACKGROUNDS))
        self._foreground = palette([color for color, _ in pairs])
        self._background = palette([background for _, background in pairs])

    def __call__(self, images: Tensor, scenes: Sequence[Scene | str]) -> OracleScores:
        """Judge images by their captions (or scenes).

        Args:
            images (Tensor): images in [0, 1], shape (batch_size, 3, 32, 32).
            scenes (Sequence[Scene | str]): what each image should show.
        """
        if len(scenes) != len(images):
            raise ValueError(
                f"Got {len(images)} images and {len(scenes)} captions; expected one caption for each image."
            )
        reading = self.read(images)
        wanted = torch.tensor([as_scene(scene).indices for scene in scenes]).reshape(-1, len(ATTRIBUTES))
        return OracleScores(attributes=reading.indices == wanted, cleanness=reading.cleanness)

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 128) -> Reading:
        """Read images in [0, 1] of shape (count, 3, 32, 32)."""
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; expected (count, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), "
                "for example what the pipeline's autoencoder decodes, mapped to [0, 1]."
            )
        readings = [self._read_batch(batch) for batch in images.detach().float().cpu().split(batch_size)]
        if not readings:
            return Reading(torch.empty(0, len(ATTRIBUTES), dtype=torch.long), torch.empty(0))
        return Reading(
            indices=torch.cat([reading.indices for reading in readings]),
            residual=torch.cat([reading.residual for reading in readings]),
        )

    def _read_batch(self, images: Tensor) -> Reading:
        template, pair = self._nearest_template(images)
        color, background = pair // len(BACKGROUNDS), pair % len(BACKGROUNDS)
        size, shape = self._size[template], self._shape[template]
        placement = Placement(center=self._placement.center[template], radius=self._placement.radius[template])
        residual = _refine(images, shape, placement, self._foreground[pair], self._background[pair], size)
        return Reading(indices=torch.stack([size, color, shape, background], dim=1), residual=residual)

    def _nearest_template(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Template and pair of colors with the least squared error for each image, both of shape (batch_size,).

        With template M, background b and contrast c = foreground - b:
            |image - b - c M|^2 = |image - b|^2 - 2 c . (image . M) + 2 (c . b) sum(M) + |c|^2 sum(M^2)
        """
        images = F.avg_pool2d(images, POOLING)
        contrast = self._foreground - self._background
        overlap = (images.flatten(2) @ self._templates.T).transpose(1, 2)
        sums = torch.stack([self._templates.sum(dim=1), self._templates.square().sum(dim=1)], dim=1)
        features = torch.cat([overlap, sums.expand(len(images), -1, -1)], dim=2)
        weights = [-2 * contrast, 2 * (contrast * self._background).sum(1, True), contrast.square().sum(1, True)]
        errors, templates = (features @ torch.cat(weights, dim=1).T).min(dim=1)
        plain = (images[:, None] - self._background[:, :, None, None]).square().sum(dim=(2, 3, 4))
        pair = (errors + plain).argmin(dim=1)
        return templates.gather(1, pair[:, None])[:, 0], pair


def _refine(
    images: Tensor,
    shape: Tensor,
    placement: Placement,
    foreground: Tensor,
    background: Tensor,
    size: Tensor,
    iterations: int = 3,
    step: float = 0.25,
) -> Tensor:
    """Root-mean-square error of the best render near `placement`, by damped Gauss-Newton steps with differences."""
    low, high = torch.tensor([RADIUS_RANGES[name] for name in SIZES])[size].unbind(1)

    def draw(parameters: Tensor) -> Tensor:
        cover = coverage(shape, Placement(center=parameters[:, :2], radius=parameters[:, 2]))
        return compose(foreground, background, cover).flatten(1)

    target = images.flatten(1)
    parameters = torch.cat([placement.center, placement.radius[:, None]], dim=1)
    current = draw(parameters)
    best = (current - target).square().mean(dim=1)
    for _ in range(iterations):
        jacobian = torch.stack([(draw(parameters + shift) - current) / step for shift in step * torch.eye(3)], dim=2)
        normal = jacobian.mT @ jacobian + 1e-2 * torch.eye(3)
        update = torch.linalg.solve(normal, jacobian.mT @ (target - current)[:, :, None])[:, :, 0]
        parameters = parameters + update.clamp(-1, 1)
        parameters[:, 2] = parameters[:, 2].clamp(low, high)
        current = draw(parameters)
        best = torch.minimum(best, (current - target).square().mean(dim=1))
    return best.sqrt()


def _accuracy_row(oracle: Oracle, name: str, images: Tensor, scenes: Sequence[Scene]) -> str:
    scores = oracle(images, scenes)
    right = scores.attributes.float()
    cells = [*right.mean(dim=0).tolist(), right.mean().item(), right.all(dim=1).float().mean().item()]
    return f"| {name} | " + " | ".join(f"{100 * cell:.1f}" for cell in cells) + f" | {scores.cleanness.mean():.2f} |"


def accuracy_table(renders_per_scene: int = 8, strengths: Sequence[float] = (0.3, 0.6, 1.0), seed: int = 0) -> str:
    """How often the oracle reads renders of every scene right, in percent, as a Markdown table.

    Args:
        renders_per_scene (int): random placements of each of the 144 scenes.
        strengths (Sequence[float]): strengths of each degradation.
        seed (int): seeds placements and degradations.
    """
    oracle, generator = Oracle(), torch.Generator().manual_seed(seed)
    scenes = all_scenes() * renders_per_scene
    images = render(scenes, generator)
    lines = [f"| renders | {' | '.join(ATTRIBUTES)} | fit | all four | cleanness |", "|---" * 8 + "|"]
    lines.append(_accuracy_row(oracle, "clean", images, scenes))
    for kind, strength in itertools.product(DEGRADATIONS, strengths):
        spoiled = degrade(images, strength, generator, [kind])
        lines.append(_accuracy_row(oracle, f"{kind} {strength:g}", spoiled, scenes))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How often does the oracle read renders right?")
    parser.add_argument("--renders-per-scene", type=int, default=8, help="random placements of each of the 144 scenes")
    parser.add_argument("--seed", type=int, default=0, help="seeds placements and degradations")
    arguments = parser.parse_args()
    print(accuracy_table(renders_per_scene=arguments.renders_per_scene, seed=arguments.seed))


if __name__ == "__main__":
    main()
