"""When a reward is refreshed, with what, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dina_reward.checks.values import check_fields, check_kind
from dina_reward.distill.drift import DriftSettings
from dina_reward.likelihood import PreferenceLossName


@dataclass(frozen=True)
class RefreshSettings:
    """When a reward is refreshed, and with what.

    Args:
        every: generations between two refreshes; None: only on alarm or drift.
        on_alarm: also after an evaluation at which the reward-hacking alarm went off.
        drift: when it counts as out of its depth; None: not looked at.
        budget: judgements of a refresh that the reward is trained on.
        audit_budget: judgements of a refresh that it is checked with.
        max_judgements: of the whole run; a refresh that would exceed it is left out.
        steps: optimizer steps of the reward in a refresh.
        batch_size: pairs of a step, over all processes.
        learning_rate: of the reward.
        loss_type: as in `LatentRewardTrainingConfig`; by default the negative log-likelihood, ``"gaussian"`` regresses.
        replay: old pairs that are trained on again, for each new one.
        tolerance: loss of accuracy on the audit, as a share, at which a refreshed reward is still taken.
    """

    every: int | None = 10
    on_alarm: bool = True
    drift: DriftSettings | None = None
    budget: int = 200
    audit_budget: int = 60
    max_judgements: int | None = None
    steps: int = 60
    batch_size: int = 32
    learning_rate: float = 1e-4
    loss_type: PreferenceLossName | None = None
    replay: float = 1.0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        large = math.inf
        if self.drift is not None:
            check_kind("drift", self.drift, DriftSettings)
        check_fields(
            self,
            every=(1, large),
            budget=(1, large),
            audit_budget=(1, large),
            max_judgements=(1, large),
            steps=(1, large),
            batch_size=(1, large),
            learning_rate=(0, 1),
            replay=(0, large),
            tolerance=(0, 1),
        )


@dataclass(frozen=True)
class RefreshRecord:
    """One refresh.

    Args:
        number: of the refresh, from 0.
        step: optimizer steps that the policy had made.
        reasons: for it.
        judge_calls: judgements, those of the audit included.
        pairs, replayed: new pairs, and old ones, that the reward was trained on.
        accuracy_before, accuracy_after: on the audit's pairs, whose prompts are never trained on.
        margin_correlation: between the margins of these pairs, which are what advantages are made of, before and after.
        margin_flips: share of them that changed their sign.
        margin_scale: standard deviation after over that before.
        accepted: whether the refreshed reward was taken.
    """

    number: int
    step: int
    reasons: list[str]
    judge_calls: int
    pairs: int
    replayed: int
    accuracy_before: float
    accuracy_after: float
    margin_correlation: float
    margin_flips: float
    margin_scale: float
    accepted: bool

    def as_metrics(self) -> dict[str, float]:
        """As they stand in a log line."""
        names = ("judge_calls", "pairs", "replayed", "margin_correlation", "margin_flips", "margin_scale", "accepted")
        values = {name: float(getattr(self, name)) for name in names}
        audit = {"audit_accuracy/before": self.accuracy_before, "audit_accuracy/after": self.accuracy_after}
        return {f"refresh/{name}": value for name, value in {**values, **audit}.items()}
