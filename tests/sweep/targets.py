"""What is swept: public functions with right arguments, and which of the other kinds are right, too."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers import TrainingArguments

from dina_reward.alignment import (
    AlignmentConfig,
    DDPOConfig,
    DiffusionGRPOConfig,
    DiffusionNFTConfig,
    OnlineDPOConfig,
    RewardBackpropConfig,
)
from dina_reward.alignment.objectives.advantages import compute_advantages
from dina_reward.checks.values import fits
from dina_reward.data import CacheSettings, LatentPreferenceDataset, PreferencePair, read_preferences
from dina_reward.evaluation import TieConvention
from dina_reward.likelihood import PreferenceLoss, ThurstoneModel, preference_model
from dina_reward.modeling import LatentRewardConfig, RewardHeadConfig
from dina_reward.noise import LevelSampler, draw_noise
from dina_reward.reward import LatentReward
from dina_reward.training import LatentRewardTrainingConfig
from tests.sweep.kinds import ANYWHERE, variants
from tests.sweep.target import FLAGS, LEVELS, NOTHING, PROMPTS, SEEDS, TEXT, Target
from tests.tiny_models import tiny_sd3_pipeline
from tests.training.tiny_reward import tiny_reward


@cache
def reward() -> LatentReward:
    return tiny_reward().eval()


def latents() -> Any:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def prompts() -> list[str]:
    return ["a cat", "a dog"]


def embeddings(*shape: int) -> Callable[[], Any]:
    return lambda: torch.ones(2, *shape)


SCORE = Target(
    "LatentReward.score",
    lambda **arguments: reward()(**arguments),
    {
        "latents": latents,
        "prompts": prompts,
        "height": lambda: 64,
        "width": lambda: 64,
        "noise_level": lambda: [0.2, 0.4],
        "ensemble": lambda: "mean",
        "num_noise_samples": lambda: 2,
        "seed": lambda: [3, 4],
        "generator": torch.Generator,
        "noise": latents,
        "share_noise": lambda: False,
        "share_noise_across_levels": lambda: False,
        "normalize": lambda: False,
        "batch_size": lambda: 1,
    },
    {
        "prompts": PROMPTS,
        "height": NOTHING,
        "width": NOTHING,
        "noise_level": LEVELS | {"one item less", "one item more"},
        "seed": SEEDS,
        "generator": NOTHING,
        "noise": NOTHING | {"one row less", "one dimension more"},
        "share_noise": FLAGS,
        "share_noise_across_levels": FLAGS,
        "normalize": FLAGS,
        "batch_size": NOTHING | {"2**70"},
    },
    alone=frozenset(
        {"seed", "generator", "noise", "height", "width", "num_noise_samples", "share_noise_across_levels"}
    ),
)
EMBEDDED = Target(
    "LatentReward.score, prompt_embeds",
    lambda **arguments: reward()(latents(), **arguments),
    {"prompt_embeds": embeddings(5, 64), "pooled_prompt_embeds": embeddings(64)},
)
NOISY = Target(
    "LatentReward.score_noisy",
    lambda **arguments: reward().score_noisy(**arguments),
    {
        "noisy_latents": latents,
        "prompts": prompts,
        "noise_level": lambda: [0.2, 0.4],
        "normalize": lambda: False,
        "batch_size": lambda: 1,
    },
    {
        "prompts": PROMPTS,
        "noise_level": frozenset({"0", "one item less"}),
        "normalize": FLAGS,
        "batch_size": NOTHING | {"2**70"},
    },
)
TIMED = Target(
    "LatentReward.score_noisy, timesteps",
    lambda **arguments: reward().score_noisy(latents(), prompts(), **arguments),
    {"timesteps": lambda: [200.0, 400.0]},
    {"timesteps": frozenset({"0", "1.5", "one item less"})},
)
PREFERENCE = Target(
    "LatentReward.preference",
    lambda **arguments: reward().preference(**arguments),
    {
        "latents_a": latents,
        "latents_b": latents,
        "prompts": prompts,
        "seed": lambda: [3, 4],
        "noise_level": lambda: 0.4,
    },
    {"prompts": PROMPTS, "seed": SEEDS, "noise_level": LEVELS},
)
FRESH = Target(
    "LatentReward.from_config",
    lambda **arguments: tiny_reward(**arguments),
    {"seed": lambda: 3},
    {"seed": frozenset({"0", "-1"})},
)
LOADED = Target(
    "LatentReward.from_pretrained",
    lambda **arguments: LatentReward.from_pretrained(**arguments, pipeline=tiny_sd3_pipeline()),
    {"path_or_id": lambda: _saved()},
)
DATASET = Target(
    "LatentPreferenceDataset",
    LatentPreferenceDataset,
    {
        "prompts": prompts,
        "chosen": latents,
        "rejected": latents,
        "p_chosen": lambda: torch.tensor([0.5, 1.0]),
        "weight": lambda: torch.tensor([0.5, 1.0]),
    },
    {"prompts": frozenset({"list of text"}), "p_chosen": NOTHING | {"as int"}, "weight": NOTHING | {"as int"}},
)
RECORD = Target(
    "PreferencePair.from_record",
    lambda **record: PreferencePair.from_record(record),
    {
        "prompt": lambda: "a cat",
        "chosen": lambda: latents()[0],
        "rejected": lambda: latents()[0],
        "p_chosen": lambda: 0.5,
        "weight": lambda: 0.5,
    },
    {
        "prompt": TEXT,
        "chosen": frozenset({"as array", "as list"}),
        "rejected": frozenset({"as array", "as list"}),
        "p_chosen": NOTHING | {"0"},
        "weight": NOTHING | {"0", "1.5", "2**70"},
    },
)
READER = Target(
    "read_preferences",
    lambda **arguments: read_preferences(_table(), **arguments),
    {
        "schema": lambda: "hpdv3",
        "seed": lambda: 3,
        "min_confidence": lambda: 0.5,
        "max_pairs_per_prompt": lambda: 5,
        "max_broken": lambda: 0.5,
        "soft_labels": lambda: True,
        "dimension": lambda: "Overall",
        "columns": lambda: ["prompt"],
    },
    {
        "schema": NOTHING,
        "seed": frozenset({"0"}),
        "min_confidence": NOTHING | {"0"},
        "max_pairs_per_prompt": NOTHING | {"2**70"},  # more than there are: all stay
        "max_broken": frozenset({"0"}),
        "soft_labels": FLAGS,
        "columns": frozenset({"empty list", "one item less", "one item more"}),
    },
)
NOISE = Target(
    "draw_noise",
    draw_noise,
    {
        "latents": latents,
        "num_samples": lambda: 2,
        "seed": lambda: [3, 4],
    },
    {"seed": SEEDS, "latents": frozenset({"holding NaN", "holding infinity"})},  # of latents only the shape is read
)
LOSS = Target(
    "PreferenceLoss",
    lambda name, margin, **scores: PreferenceLoss(name, margin=margin)(**scores),
    {
        "name": lambda: "thurstone_nll",
        "margin": lambda: 0.0,
        "score_chosen": lambda: torch.ones(2),
        "score_rejected": lambda: torch.zeros(2),
        "noise_level": lambda: torch.full((2,), 0.4),
        "target": lambda: torch.ones(2),
        "weight": lambda: torch.ones(2),
    },
    {
        "margin": frozenset({"0"}),
        "noise_level": frozenset({"as int", "one dimension less"}),  # 0 is a level; one for all pairs is a scalar
        "target": NOTHING | {"as int"},
        "weight": NOTHING | {"as int"},
    },
)
ADVANTAGES = Target(
    "compute_advantages",
    compute_advantages,
    {
        "rewards": lambda: torch.tensor([[0.1], [0.2], [0.3], [0.5]]),
        "group_ids": lambda: torch.tensor([0, 0, 1, 1]),
        "reward_weights": lambda: [1.0],
        "scale_rewards": lambda: "group",
        "multi_objective_aggregation": lambda: "sum_then_normalize",
    },
    {"reward_weights": NOTHING, "rewards": frozenset({"holding NaN", "as int"})},
)
TIES = Target("TieConvention.named", TieConvention.named, {"ties": lambda: "half"})
LIKELIHOOD = Target(
    "preference_model",
    preference_model,
    {"likelihood": lambda: "thurstone", "variance_scale": lambda: 1.0, "variance_offset": lambda: 1.0},
    # A variance has no largest value of its own; 2**70 is finite in float32.
    {"variance_scale": frozenset({"0", "1.5", "2**70"}), "variance_offset": frozenset({"1.5", "2**70"})},
)


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp())


@cache
def _saved() -> str:
    tiny_reward().save_pretrained(_folder() / "reward")
    return str(_folder() / "reward")


@cache
def _table() -> Any:
    import datasets

    row = {"prompt": "a", "path1": "a.png", "path2": "b.png", "confidence": 0.9}
    return datasets.Dataset.from_list([row] * 4)


def configuration(
    cls: type, beside: type = TrainingArguments, also: Mapping[str, frozenset[str]] | None = None, **required: Any
) -> Target:
    """A dataclass: of each field that ``beside`` lacks those kinds are right that fit its annotation, or are in ``also``."""
    inherited = set(beside.__dataclass_fields__)
    own = [f for f in fields(cls) if f.init and f.name not in inherited]
    hints = get_type_hints(cls)
    right, fine = {}, {}
    for each in own:
        value = required.get(each.name, each.default)
        if value is MISSING:
            value = each.default_factory()  # type: ignore[misc]
        right[each.name] = lambda value=value: value
        kinds = {**{kind: make() for kind, make in ANYWHERE.items()}, **dict(variants(value))}
        fine[each.name] = frozenset(kind for kind, wrong in kinds.items() if fits(wrong, hints[each.name]))
        fine[each.name] |= (also or {}).get(each.name, frozenset())
    extra = {"output_dir": str(_folder() / "run"), "use_cpu": True} if issubclass(cls, TrainingArguments) else {}
    return Target(cls.__name__, lambda **values: cls(**extra, **values), right, fine)


CONFIGURATIONS = (
    configuration(DiffusionGRPOConfig, also={"reward_noise_level": frozenset({"0"})}),  # one level is a list of one
    configuration(DDPOConfig, DiffusionGRPOConfig),
    configuration(DiffusionNFTConfig, AlignmentConfig),
    configuration(OnlineDPOConfig, AlignmentConfig),
    configuration(RewardBackpropConfig, AlignmentConfig),
    configuration(LatentRewardTrainingConfig),
    configuration(RewardHeadConfig),
    configuration(LatentRewardConfig, family="sd3", num_layers=2, visual_taps=(1, 2)),
    configuration(LevelSampler),
    configuration(ThurstoneModel),
    configuration(CacheSettings),
)
TARGETS = (
    SCORE, EMBEDDED, NOISY, TIMED,
    PREFERENCE, FRESH, LOADED, DATASET, RECORD, READER, NOISE, LOSS, ADVANTAGES, TIES, LIKELIHOOD,
    *CONFIGURATIONS,
)  # fmt: skip
