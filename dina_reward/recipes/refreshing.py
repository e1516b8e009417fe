"""What an alignment recipe does to keep its reward true: refresh it by a judge, and keep the policy that one likes best.

Importing this module loads neither torch nor diffusers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dina_reward.checks.values import check_fields


if TYPE_CHECKING:
    from dina_reward import LatentReward


_SHAPES_REPLAY = 6000


@dataclass(kw_only=True)
class RefreshArguments:
    """When and with what a run refreshes its latent reward, and which of its policies it keeps."""

    refresh_judge: list[str] | None = field(
        default=None,
        metadata={
            "help": "Judges by name that the reward is refreshed with; see dina_reward.distill.naming. null: never."
        },
    )
    refresh_judge_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per judge; null: all the same."}
    )
    refresh_every: int | None = field(
        default=10, metadata={"help": "Generations between refreshes; null: only on alarm or drift."}
    )
    refresh_on_alarm: bool = field(
        default=True, metadata={"help": "Refresh after an evaluation with a reward-hacking alarm."}
    )
    refresh_on_drift: bool = field(
        default=False,
        metadata={
            "help": "Refresh when the policy's samples leave what the reward knows: features, spread over levels."
        },
    )
    refresh_budget: int = field(
        default=200, metadata={"help": "Judgements of a refresh that the reward is trained on."}
    )
    refresh_audit_budget: int = field(
        default=60, metadata={"help": "Judgements of a refresh that it is checked with."}
    )
    refresh_max_judgements: int | None = field(
        default=None, metadata={"help": "Judgements of the run; null: no limit."}
    )
    refresh_steps: int = field(default=60, metadata={"help": "Optimizer steps of the reward in a refresh."})
    refresh_batch_size: int = field(default=32, metadata={"help": "Pairs of such a step, over all processes."})
    refresh_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the reward."})
    refresh_replay: float = field(default=1.0, metadata={"help": "Old pairs trained on again, for each new one."})
    refresh_replay_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Preferences that the reward was trained on, as old pairs from the beginning; 'shapes': of its world."
        },
    )
    refresh_group_size: int = field(default=4, metadata={"help": "Samples of a prompt that are judged and compared."})
    refresh_candidates: int = field(default=8, metadata={"help": "Samples of a prompt that are drawn to choose from."})
    refresh_judge_batch_size: int = field(default=16, metadata={"help": "Samples or pairs that a judge gets at once."})
    refresh_judge_timeout: float | None = field(default=None, metadata={"help": "Seconds until a call has failed."})
    keep_best: str | None = field(
        default=None,
        metadata={
            "help": "Score of the held-out evaluation by which the best policy is kept and restored; null: the last."
        },
    )
    keep_best_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better one; null: never."}
    )

    def __post_init__(self) -> None:
        positive = (1, math.inf)
        names = ("every", "budget", "audit_budget", "max_judgements", "steps", "batch_size", "judge_batch_size")
        limits: dict[str, Any] = {f"refresh_{name}": positive for name in names}
        check_fields(
            self,
            **limits,
            refresh_group_size=(2, 1000),
            refresh_candidates=(2, 1000),
            refresh_replay=(0, math.inf),
            refresh_learning_rate=(0, 1),
            refresh_judge_timeout=(1e-3, math.inf),
            keep_best_patience=positive,
        )
        if self.keep_best_patience is not None and self.keep_best is None:
            raise ValueError("keep_best_patience waits for a better policy by keep_best; name a judge there")


def living_callbacks(arguments: RefreshArguments, reward: Any) -> list[Any]:
    """The callbacks that the arguments ask for.

    Args:
        arguments: of the recipe.
        reward: the latent reward that is trained on.

    Raises:
        ValueError: a reward on a server is to be refreshed, whose weights are not here.
    """
    from dina_reward import LatentReward

    callbacks: list[Any] = []
    if arguments.refresh_judge is not None:
        if not isinstance(reward, LatentReward):
            raise ValueError(
                f"refresh_judge trains the reward on, and {type(reward).__name__} has no weights here; give the path of a "
                "LatentReward as reward_model_path"
            )
        callbacks.append(_refresh(arguments, reward))
    if arguments.keep_best is not None:
        from dina_reward.alignment import BestPolicyCallback

        callbacks.append(BestPolicyCallback(arguments.keep_best, arguments.keep_best_patience))
    return callbacks


def _refresh(arguments: RefreshArguments, reward: LatentReward) -> Any:
    from dina_reward.distill import (
        DriftSettings,
        JudgeLabeller,
        JudgeLimits,
        LabelSettings,
        RefreshSettings,
        RewardRefresh,
        open_judges,
    )

    assert arguments.refresh_judge is not None
    size = arguments.refresh_group_size
    labeller = JudgeLabeller(
        open_judges(arguments.refresh_judge, arguments.refresh_judge_timeout),
        arguments.refresh_judge_weights,
        JudgeLimits(arguments.refresh_judge_batch_size),
        LabelSettings(group_size=size, candidates=max(size, arguments.refresh_candidates)),
    )
    settings = RefreshSettings(
        every=arguments.refresh_every,
        on_alarm=arguments.refresh_on_alarm,
        drift=DriftSettings() if arguments.refresh_on_drift else None,
        budget=arguments.refresh_budget,
        audit_budget=arguments.refresh_audit_budget,
        max_judgements=arguments.refresh_max_judgements,
        steps=arguments.refresh_steps,
        batch_size=arguments.refresh_batch_size,
        learning_rate=arguments.refresh_learning_rate,
        replay=arguments.refresh_replay,
    )
    return RewardRefresh(labeller, reward, settings, replay=_old_pairs(arguments.refresh_replay_dataset))


def _old_pairs(dataset: str | None) -> Any:
    from dina_reward.data import load_preferences

    if dataset != "shapes":
        return None if dataset is None else load_preferences(dataset)
    from dina_reward.shapes import fresh_preferences, load_pipeline

    return fresh_preferences(load_pipeline(), "train", _SHAPES_REPLAY, 0)
