"""Policy-gradient objectives over the stochastic steps of a rollout, and the KL penalty of a step.

An objective is a pure function of named tensors. It declares the names it needs when it registers, so that a missing
one is reported by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dina_reward.checks.values import check_choice


KLKind = Literal["step", "velocity", "flow_grpo"]


@dataclass(frozen=True)
class ObjectiveSettings:
    """Hyper-parameters of the objectives.

    Args:
        epsilon (`float`): the ratio is clipped from below at ``1 - epsilon``.
        epsilon_high (`float`): and from above at ``1 + epsilon_high``.
        advantage_clip (`float`): advantages are clamped to ``[-advantage_clip, advantage_clip]``.
    """

    epsilon: float = 1e-4
    epsilon_high: float = 1e-4
    advantage_clip: float = 5.0


@dataclass(frozen=True)
class ObjectiveOutput:
    """Loss of one step of one chunk.

    Args:
        loss (`Tensor`): scalar.
        metrics (`dict[str, Tensor]`): detached scalars for the log.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


def reduction(name: str) -> Callable[[Tensor], Tensor]:
    """How values of a metric become one: the mean of those that are there; of the ratio's extremes, the extreme."""
    extremes: dict[str, Callable[[Tensor], Tensor]] = {"ratio/min": torch.min, "ratio/max": torch.max}
    return extremes.get(name, torch.nanmean)


def mean_output(outputs: Sequence[ObjectiveOutput]) -> ObjectiveOutput:
    """Mean loss of several steps, their metrics by `reduction`."""
    loss = torch.stack([output.loss for output in outputs]).mean()
    names = outputs[0].metrics
    return ObjectiveOutput(loss, {n: reduction(n)(torch.stack([each.metrics[n] for each in outputs])) for n in names})


ObjectiveFunction = Callable[[Mapping[str, Tensor], ObjectiveSettings], ObjectiveOutput]


@dataclass(frozen=True)
class Objective:
    """A registered objective: call it with a mapping that holds at least the tensors named in ``requires``.

    ``sde_types`` are the stochastic steps that its formula is made for; ``None`` for all. If the mapping also has
    ``"weights"``, shape ``(batch,)``, the loss is the mean of the weighted losses of the rows.
    """

    name: str
    requires: tuple[str, ...]
    function: ObjectiveFunction
    sde_types: tuple[str, ...] | None = None

    def __call__(self, tensors: Mapping[str, Tensor], settings: ObjectiveSettings) -> ObjectiveOutput:
        missing = [key for key in self.requires if key not in tensors]
        if missing:
            raise ValueError(
                f"objective {self.name!r} needs {', '.join(self.requires)}; missing: {', '.join(missing)} "
                f"(given: {', '.join(sorted(tensors))})"
            )
        return self.function(tensors, settings)


_OBJECTIVES: dict[str, Objective] = {}


def register_objective(
    name: str, requires: tuple[str, ...], sde_types: tuple[str, ...] | None = None
) -> Callable[[ObjectiveFunction], ObjectiveFunction]:
    """Decorator that makes an objective known under a name.

    Args:
        name: value of `loss_type`.
        requires: names of the tensors it reads, of shape ``(batch,)`` or scalar: ``log_prob``, ``old_log_prob``,
            ``advantages``, ``mean_shift`` (mean over elements of the squared distance of the step's mean from the
            sampling policy's), ``std`` and ``delta`` of the step's `Transition`.
        sde_types: stochastic steps that the formula is made for; all by default.
    """

    def register(function: ObjectiveFunction) -> ObjectiveFunction:
        _OBJECTIVES[name] = Objective(name, requires, function, sde_types)
        return function

    return register


def objective_names() -> tuple[str, ...]:
    """Names of all registered objectives."""
    return tuple(sorted(_OBJECTIVES))


def get_objective(name: str) -> Objective:
    """A registered objective.

    Raises:
        ValueError: no objective of this name.
    """
    check_choice("loss_type", name, objective_names())
    return _OBJECTIVES[name]


def check_objective_fits(name: str, sde_type: str) -> None:
    """Raises a `ValueError` when an objective's formula is not made for this kind of stochastic step."""
    fitting = get_objective(name).sde_types
    if fitting is not None and sde_type not in fitting:
        raise ValueError(f"loss_type {name!r} is defined for sde_type {' and '.join(fitting)} only, got {sde_type!r}")


@register_objective("ppo_clip", requires=("log_prob", "old_log_prob", "advantages"))
def ppo_clip(tensors: Mapping[str, Tensor], settings: ObjectiveSettings) -> ObjectiveOutput:
    """``mean max(-A r, -A clip(r, 1 - eps, 1 + eps_high))`` with ``r = exp(logp - logp_old)`` (arXiv 1707.06347)."""
    advantages = tensors["advantages"].clamp(-settings.advantage_clip, settings.advantage_clip)
    difference = tensors["log_prob"] - tensors["old_log_prob"]
    ratio = torch.exp(difference)
    low, high = 1 - settings.epsilon, 1 + settings.epsilon_high
    return ObjectiveOutput(
        _mean(_clipped(advantages, ratio, low, high), tensors),
        _ratio_metrics(ratio.detach(), difference.detach(), low, high),
    )


@register_objective(
    "grpo_guard",
    requires=("log_prob", "old_log_prob", "advantages", "mean_shift", "std", "delta"),
    sde_types=("flow_sde", "dance_sde"),
)
def grpo_guard(tensors: Mapping[str, Tensor], settings: ObjectiveSettings) -> ObjectiveOutput:
    """PPO-clip with a normalised ratio (GRPO-Guard, arXiv 2510.22319).

    The log-ratio of a Gaussian step has mean ``-b`` under the sampling policy, with ``c = g sqrt(-D)`` and
    ``b = mean((mean - mean_old)^2) / (2 c^2)``, so clipping acts on one side, and its spread grows as ``c`` shrinks. Guard
    corrects both, ``r = exp((logp - logp_old + b) c)``, and divides the loss by ``-D``, so that all steps weigh the same.
    """
    advantages = tensors["advantages"].clamp(-settings.advantage_clip, settings.advantage_clip)
    std = tensors["std"]
    bias = tensors["mean_shift"] / (2 * std**2)
    difference = (tensors["log_prob"] - tensors["old_log_prob"] + bias) * std
    ratio = torch.exp(difference)
    low, high = 1 - settings.epsilon, 1 + settings.epsilon_high
    return ObjectiveOutput(
        _mean(_clipped(advantages, ratio, low, high), tensors) / tensors["delta"],
        _ratio_metrics(ratio.detach(), difference.detach(), low, high),
    )


@register_objective("policy_gradient", requires=("log_prob", "advantages"))
def policy_gradient(tensors: Mapping[str, Tensor], settings: ObjectiveSettings) -> ObjectiveOutput:
    """``-mean(A logp)``, the score-function estimator (DDPO-SF, arXiv 2305.13301); on-policy data only."""
    advantages = tensors["advantages"].clamp(-settings.advantage_clip, settings.advantage_clip)
    return ObjectiveOutput(_mean(-advantages * tensors["log_prob"], tensors), {})


def _clipped(advantages: Tensor, ratio: Tensor, low: float, high: float) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))


def _mean(losses: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    weights = tensors.get("weights")
    return losses.mean() if weights is None else (weights * losses).mean()


def _ratio_metrics(ratio: Tensor, difference: Tensor, low: float, high: float) -> dict[str, Tensor]:
    return {
        "approx_kl": 0.5 * (difference**2).mean(),
        "clip_frac": ((ratio < low) | (ratio > high)).float().mean(),
        "ratio/mean": ratio.mean(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
    }


def step_kl(
    kl_kind: KLKind,
    *,
    mean: Tensor,
    reference_mean: Tensor,
    velocity: Tensor,
    reference_velocity: Tensor,
    std: Tensor,
    diffusion: Tensor,
) -> Tensor:
    """Distance of one step of the policy from the reference; the gradient flows through ``mean`` and ``velocity``.

    A ``beta`` belongs to one definition:

    | kind | value (mean over latent elements) |
    |---|---|
    | ``step`` | ``(mean - mean_ref)^2 / (2 std^2)``: the exact KL of two Gaussians of equal std, per element |
    | ``flow_grpo`` | ``(mean - mean_ref)^2 / (2 g^2)``: as the Flow-GRPO code, which leaves out ``-D`` of ``std^2`` |
    | ``velocity`` | ``(v - v_ref)^2`` |

    Args:
        mean, reference_mean, velocity, reference_velocity (`Tensor`): shape ``(batch, ...)``.
        std, diffusion (`Tensor`): of the step's `Transition`.

    Returns:
        `Tensor` of shape ``(batch,)``, float32.
    """
    check_kl_kind(kl_kind)
    if kl_kind == "velocity":
        difference, scale = velocity.float() - reference_velocity.float(), torch.ones_like(std)
    else:
        difference = mean.float() - reference_mean.float()
        scale = 2 * (std if kl_kind == "step" else diffusion) ** 2
    return (difference**2).flatten(start_dim=1).mean(dim=1) / scale


def check_kl_kind(kl_kind: str) -> None:
    """Raises a `ValueError` for an unknown ``kl_kind``."""
    if kl_kind not in get_args(KLKind):
        raise ValueError(f"unknown kl_kind {kl_kind!r}; choose one of {', '.join(get_args(KLKind))}")
