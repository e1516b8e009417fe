"""The caption grammar of the shapes world: scenes, their captions, and the train / held-out split."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace


SIZES = ("small", "large")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = ("white", "gray", "black")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "color": COLORS,
    "shape": SHAPES,
    "background": BACKGROUNDS,
}
"""Every attribute of a scene with its possible values, in the order of the caption."""

SPLITS = ("train", "held_out")

_CAPTION = re.compile(r"a (\w+) (\w+) (\w+) on a (\w+) background")


@dataclass(frozen=True)
class Scene:
    """One shape on a plain background.

    Args:
        size (str): one of `SIZES`.
        color (str): one of `COLORS`.
        shape (str): one of `SHAPES`.
        background (str): one of `BACKGROUNDS`.
    """

    size: str
    color: str
    shape: str
    background: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in ATTRIBUTES[field.name]:
                raise ValueError(f"{field.name} is {value!r}; expected one of {', '.join(ATTRIBUTES[field.name])}.")

    @property
    def caption(self) -> str:
        """The caption that describes this scene."""
        return f"a {self.size} {self.color} {self.shape} on a {self.background} background"

    @property
    def indices(self) -> tuple[int, ...]:
        """Position of each attribute's value in `ATTRIBUTES`: (size, color, shape, background)."""
        return tuple(values.index(getattr(self, name)) for name, values in ATTRIBUTES.items())

    @property
    def held_out(self) -> bool:
        """Whether no training ever sees this scene; see `all_scenes`."""
        _, color, shape, background = self.indices
        return (color + shape + background) % 3 == 0

    @classmethod
    def from_indices(cls, indices: Sequence[int]) -> Scene:
        """The scene with the given positions in `ATTRIBUTES`; the inverse of `indices`."""
        return cls(*(values[index] for values, index in zip(ATTRIBUTES.values(), indices, strict=True)))

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """The scene that `caption` describes; the inverse of `caption`.

        Case and surrounding blanks do not matter. Anything outside the grammar is a `ValueError`.
        """
        match = _CAPTION.fullmatch(" ".join(caption.lower().split()))
        if match is None:
            raise ValueError(
                f"Cannot read the caption {caption!r}; expected 'a SIZE COLOR SHAPE on a BACKGROUND background', "
                "for example 'a large red circle on a white background'."
            )
        return cls(*match.groups())


def as_scene(scene: Scene | str) -> Scene:
    """`scene` itself, or the scene that a caption describes."""
    return Scene.parse(scene) if isinstance(scene, str) else scene


def all_scenes(split: str | None = None) -> list[Scene]:
    """Every scene of a split in a fixed order: 96 for "train", 48 for "held_out", 144 for `None`.

    For each color and shape exactly one background is held out, at both sizes, so that every attribute value occurs in
    both splits equally often, and every pair of values occurs in training, while no held-out triple (color, shape,
    background) does.
    """
    scenes = [Scene(*values) for values in itertools.product(*ATTRIBUTES.values())]
    if split is None:
        return scenes
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected None or one of {', '.join(SPLITS)}.")
    return [scene for scene in scenes if scene.held_out == (split == "held_out")]


def sample_scenes(count: int, split: str | None = "train", *, seed: int) -> list[Scene]:
    """Draw `count` scenes of a split, as evenly as possible.

    The split is shuffled and dealt out whole before any scene comes a second time.
    """
    if count < 0:
        raise ValueError(f"count is {count}; expected zero or more scenes.")
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        deck = all_scenes(split)
        rng.shuffle(deck)
        scenes += deck[: count - len(scenes)]
    return scenes


def sample_prompts(count: int, split: str | None = "train", *, seed: int) -> list[str]:
    """The captions of `sample_scenes`."""
    return [scene.caption for scene in sample_scenes(count, split, seed=seed)]


def change_attributes(scene: Scene, count: int, rng: random.Random) -> Scene:
    """`scene` with `count` randomly chosen attributes set to another value."""
    if not 0 <= count <= len(ATTRIBUTES):
        raise ValueError(f"count is {count}; a scene has {len(ATTRIBUTES)} attributes, so expected 0 to 4.")
    changes = {}
    for name in rng.sample(list(ATTRIBUTES), count):
        changes[name] = rng.choice([value for value in ATTRIBUTES[name] if value != getattr(scene, name)])
    return replace(scene, **changes)
