"""A source whose samples cost nothing, and judges of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.sampling.seeding import noise_by_row
from dina_reward.distill.sources import SampleSource


PROMPTS = ["a cat", "a dog", "red", "blue"]


class NoiseSource(SampleSource):
    """Latents that are noise; images show the mean of each latent's first channels."""

    def __init__(self, latent_shape: Sequence[int] = (4, 2, 2)) -> None:
        self.height = self.width = 16
        self.latent_shape = tuple(latent_shape)
        self.drawn = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        self.drawn += len(prompts)
        return noise_by_row(seeds, self.latent_shape)

    def decode(self, latents: Tensor) -> Tensor:
        shade = latents[:, :1].flatten(1).mean(1).sigmoid()
        return shade[:, None, None, None].expand(-1, 3, 16, 16).clone()

    def identity(self) -> dict[str, Any]:
        return {"noise": list(self.latent_shape)}


class Brightness:
    """A judge of images that remembers how often it was asked, and may be told to fail."""

    def __init__(self, fail_after: int | None = None, noise: float = 0.0) -> None:
        self.asked: list[int] = []
        self.fail_after, self.noise = fail_after, noise

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise RuntimeError("out of order")
        self.asked.append(len(prompts))
        generator = torch.Generator().manual_seed(len(self.asked))
        return images.flatten(1).mean(1).logit() + self.noise * torch.randn(len(prompts), generator=generator)


def brighter(images_a: Tensor, images_b: Tensor, prompts: Sequence[str]) -> list[str]:
    """A judge of pairs."""
    a, b = images_a.flatten(1).mean(1), images_b.flatten(1).mean(1)
    return ["a" if first > second else "b" for first, second in zip(a.tolist(), b.tolist(), strict=True)]
