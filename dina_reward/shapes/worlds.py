"""The two generators of the shapes world: what differs between flow matching and DDPM, in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dina_reward.families import families
from dina_reward.modeling import LatentRewardConfig

from .ddpm import sample_ddim_latents, train_ddpm_generator
from .generator import sample_latents, train_generator


@dataclass(frozen=True)
class World:
    """A generator of the shapes world and how to work with it.

    Args:
        name (str): "flow" or "ddpm"; also the directory of the shipped pipeline, and with "-reward" of its reward.
        pipeline_class (str): name of the diffusers pipeline class.
        train (Callable): trains the generator around an autoencoder.
        sample (Callable): draws latents, see `sample_latents` and `sample_ddim_latents`.
        eta (float): share of fresh noise of stochastic samples in the preference pool.
        backbone (dict): blocks that the reward reads, as fields of `LatentRewardConfig`.
        alignment (dict): sampler and optimizer of Flow-GRPO and DDPM GRPO, as fields of `DiffusionGRPOConfig`.
    """

    name: str
    pipeline_class: str
    train: Callable[..., Any]
    sample: Callable[..., Tensor]
    eta: float
    backbone: dict[str, Any]
    alignment: dict[str, Any]

    def reward_config(self, **kwargs: Any) -> LatentRewardConfig:
        """Configuration of the reward that reads this generator's blocks."""
        family = next(family for family in families() if self.pipeline_class in family.pipeline_classes)
        defaults = {"family": family.name, "backbone_model_id": f"../{self.name}", **self.backbone}
        return LatentRewardConfig(**{**defaults, **kwargs})


WORLDS = (
    World(
        name="flow",
        pipeline_class="StableDiffusion3Pipeline",
        train=train_generator,
        sample=sample_latents,
        eta=0.8,
        backbone={"num_layers": 4, "visual_taps": (2, 3, 4)},
        alignment={
            "num_inference_steps": 10,
            "sde_type": "cps",
            "eta": 0.8,
            "sde_window_size": 3,
            "learning_rate": 1e-3,
            "epsilon": 1e-3,
        },
    ),
    World(
        name="ddpm",
        pipeline_class="StableDiffusionPipeline",
        train=train_ddpm_generator,
        sample=sample_ddim_latents,
        eta=1.0,
        backbone={"num_layers": 3, "visual_taps": (1, 2, 3), "text_taps": (1,)},
        alignment={
            "num_inference_steps": 6,
            "sde_type": "ddim",
            "eta": 1.0,
            "sde_window_size": 4,
            "sde_window_range": [0, 4],
            "learning_rate": 2e-3,
            "epsilon": 1e-2,
            "scale_rewards": "batch",
        },
    ),
)


def get_world(name: str) -> World:
    """The world called "flow" or "ddpm".

    Raises:
        ValueError: no world of this name.
    """
    for world in WORLDS:
        if world.name == name:
            return world
    raise ValueError(f"No world called {name!r}; there are: {', '.join(world.name for world in WORLDS)}.")


def world_of(pipeline: Any) -> World:
    """The world that a pipeline belongs to, by its class."""
    for world in WORLDS:
        if world.pipeline_class == type(pipeline).__name__:
            return world
    raise ValueError(f"{type(pipeline).__name__} is not a generator of the shapes world.")
