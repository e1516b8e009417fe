"""Targets among what uses a reward: search, distillation, serving, evaluation, and the clients' entries."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from dina_reward.distill import JudgeLabeller, JudgeLimits, LabelSettings, RefreshSettings, RewardRefresh
from dina_reward.distill.drift import DriftSettings
from dina_reward.evaluation import PairProtocol, evaluate_preferences
from dina_reward.integrations import LatentScorer, MicroBatcher, ScoreCallback, as_trl_reward, multi_score_with
from dina_reward.integrations.dance_grpo import as_row_reward
from dina_reward.search import search
from dina_reward.serving import RemoteReward
from tests.alignment.tiny_policy import tiny_pipeline
from tests.sweep.target import FLAGS, LEVELS, NOTHING, PROMPTS, TEXT, Target
from tests.sweep.targets import configuration
from tests.training.tiny_reward import separable_pairs, tiny_reward


FUNCTIONS = frozenset({"function", "module"})  # a module is called like a function
MANY = frozenset({"2**70"})
NUMBERS = frozenset({"0", "-1", "1.5"}) | MANY


@cache
def pipeline() -> Any:
    return tiny_pipeline()


@cache
def reward() -> Any:
    return tiny_reward(pipeline=pipeline()).eval()


def _latents() -> Any:
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def _prompts() -> list[str]:
    return ["a cat", "a dog"]


def _judge(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).mean(1)


def _searched(**arguments: Any) -> Any:
    settings: dict[str, Any] = {
        "method": "best_of_n",
        "budget": 1,
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
    }
    return search(**{"pipeline": pipeline(), "reward": reward(), "prompts": "a cat", **settings, **arguments})


SEARCH = Target(
    "search",
    _searched,
    {
        "pipeline": pipeline,
        "reward": reward,
        "prompts": _prompts,
        "method": lambda: "best_of_n",
        "budget": lambda: 1,
        "keep": lambda: 1,
        "reward_weights": lambda: [1.0],
        "num_inference_steps": lambda: 2,
        "guidance_scale": lambda: 1.0,
        "height": lambda: 32,
        "width": lambda: 32,
        "num_frames": lambda: 1,
        "max_sequence_length": lambda: 8,
        "reward_noise_level": lambda: 0.4,
        "reward_ensemble": lambda: "tokens",
        "reward_num_noise_samples": lambda: 1,
        "score_as": lambda: "state",
        "batch_size": lambda: 2,
        "seed": lambda: 3,
        "return_pairs": lambda: False,
    },
    {
        "prompts": PROMPTS | {"one item less", "one item more"},
        "budget": frozenset({"1.5"}),
        "reward_weights": NOTHING,
        "num_inference_steps": NOTHING,
        "guidance_scale": frozenset({"0", "1.5"}) | MANY,  # whether 2**70 makes sense is for the user to say
        "height": NOTHING,
        "width": NOTHING,
        "max_sequence_length": NOTHING,
        "reward_noise_level": LEVELS,
        "batch_size": MANY,
        "seed": frozenset({"0"}),
        "return_pairs": FLAGS,
    },
)
STOCHASTIC = Target(
    "search, method='fk'",
    lambda **arguments: _searched(method="fk", num_inference_steps=3, budget=4, **arguments),
    {"sde_type": lambda: "flow_sde", "eta": lambda: 0.7},
    {"sde_type": NOTHING, "eta": NOTHING | {"1.5"}},
    alone=frozenset({"sde_type", "eta"}),
)
REMOTE = Target(
    "RemoteReward",
    lambda **arguments: RemoteReward(**arguments).close(),
    {
        "url": lambda: "http://127.0.0.1:1",
        "token": lambda: "secret",
        "timeout": lambda: 1.0,
        "batch_size": lambda: 2,
        "max_connections": lambda: 2,
    },
    {
        "url": frozenset({"text", "text of a number", "list of text"}),  # names of hosts, as far as one can see
        "token": NOTHING | TEXT,
        "timeout": frozenset({"1.5"}),
        "batch_size": MANY,
    },
)
LABELLER = Target(
    "JudgeLabeller",
    JudgeLabeller,
    {
        "judge": lambda: _judge,
        "weights": lambda: [1.0],
        "limits": JudgeLimits,
        "settings": LabelSettings,
        "timeout": lambda: 10.0,
    },
    {"weights": NOTHING, "limits": NOTHING, "settings": NOTHING, "timeout": NOTHING | {"1.5"}},
)
REFRESH = Target(
    "RewardRefresh",
    RewardRefresh,
    {
        "labeller": lambda: JudgeLabeller(_judge),
        "reward": reward,
        "settings": RefreshSettings,
        "audit_prompts": _prompts,
        "replay": lambda: separable_pairs(2),
    },
    {"settings": NOTHING, "audit_prompts": NOTHING | PROMPTS | {"one item less", "one item more"}, "replay": NOTHING},
)


def _evaluated(**arguments: Any) -> Any:
    return evaluate_preferences(**{"reward": reward(), "pairs": separable_pairs(2), "progress": False, **arguments})


EVALUATED = Target(
    "evaluate_preferences",
    _evaluated,
    {
        "reward": reward,
        "pairs": lambda: separable_pairs(2),
        "protocol": lambda: PairProtocol((0.4,), None),
        "by": lambda: ["prompt"],
        "ties": lambda: "half",
        "num_bins": lambda: 2,
        "resamples": lambda: 2,
        "batch_size": lambda: 2,
        "progress": lambda: False,
    },
    {
        "protocol": NOTHING,
        "by": frozenset({"empty list", "one item less", "one item more"}),
        "batch_size": MANY,
        "progress": FLAGS,
    },
)
PROTOCOL = Target(
    "PairProtocol",
    PairProtocol,
    {
        "noise_levels": lambda: [0.2, 0.4],
        "ensemble_levels": lambda: [0.2, 0.4],
        "ensemble": lambda: "mean",
        "seed": lambda: 3,
    },
    {
        "noise_levels": frozenset({"empty list", "one item less"}),
        "ensemble_levels": NOTHING | {"empty list", "one item less"},
        "seed": frozenset({"0", "-1"}),
    },
)
SCORER = Target(
    "integrations.LatentScorer",
    lambda latents, prompts, **settings: LatentScorer(**{"reward": reward(), **settings})(latents, prompts),
    {
        "reward": reward,
        "seed": lambda: 3,
        "score_scale": lambda: 2.0,
        "score_bias": lambda: 1.0,
        "latents": _latents,
        "prompts": _prompts,
    },
    {
        "seed": frozenset({"0", "-1"}),
        "score_scale": NUMBERS,
        "score_bias": NUMBERS,
        "prompts": frozenset({"list of text", "as array of objects"}),
    },
)
ROWS = Target(
    "integrations.as_row_reward",
    lambda latents, captions: as_row_reward(reward())(latents, captions),
    {"latents": _latents, "captions": _prompts},
    {"captions": PROMPTS | {"as array of objects"}},
)
TRL = Target(
    "integrations.as_trl_reward",
    lambda images, prompts, **settings: as_trl_reward(**{"reward": reward(), **settings})(images, prompts),
    {
        "reward": reward,
        "differentiable": lambda: False,
        "seed": lambda: 3,
        "images": _latents,
        "prompts": _prompts,
    },
    {
        "differentiable": FLAGS,
        "seed": frozenset({"0", "-1"}),
        "prompts": frozenset({"list of text", "as array of objects"}),
    },
)
FLOW_GRPO = Target(
    "integrations.multi_score_with",
    lambda **arguments: multi_score_with(**{"reward": reward(), **arguments}),
    {
        "reward": reward,
        "weights": lambda: {"latent_reward": 1.0},
        "pixel_multi_score": lambda: _judge,
        "seed": lambda: 3,
    },
    {
        "weights": NOTHING,
        "pixel_multi_score": NOTHING | FUNCTIONS,
        "seed": frozenset({"0", "-1"}),
    },
)
CALLBACK = Target(
    "integrations.ScoreCallback",
    lambda **arguments: ScoreCallback(**{"reward": reward(), **arguments}),
    {
        "reward": reward,
        "prompts": _prompts,
        "steps": lambda: [1, 2],
        "stop": lambda: lambda step, scores: False,
        "seed": lambda: 3,
    },
    {
        "prompts": NOTHING | PROMPTS | {"one item less", "one item more"},  # how many images there are comes later
        "steps": NOTHING | {"empty list", "set", "one item less", "one item more"},
        "stop": NOTHING | FUNCTIONS,
        "seed": frozenset({"0", "-1"}),
    },
)
BATCHER = Target(
    "integrations.MicroBatcher",
    lambda **arguments: MicroBatcher(**{"reward": reward(), **arguments}),
    {"reward": reward, "max_batch_size": lambda: 2, "max_wait_ms": lambda: 1.0},
    {"max_batch_size": MANY, "max_wait_ms": frozenset({"0", "1.5"})},
)


SETTINGS = tuple(configuration(cls) for cls in (LabelSettings, JudgeLimits, RefreshSettings, DriftSettings))
TOOLS = (
    SEARCH, STOCHASTIC, REMOTE, LABELLER, REFRESH, EVALUATED, PROTOCOL, SCORER, ROWS, TRL, FLOW_GRPO, CALLBACK, BATCHER,
    *SETTINGS,
)  # fmt: skip
