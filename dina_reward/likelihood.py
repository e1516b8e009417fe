"""Preference likelihoods: from the scores of two latents to the probability that the first is preferred, and losses.

The noise-calibrated Thurstone model (arXiv 2602.11146) gives each score the variance ``var(sigma) = k sigma^2 + c``,
so the same margin means less when the latents were read through more noise. `PreferenceModel` is the choice of likelihood
behind one method, `PreferenceModel.probability`; the Bradley-Terry model is the alternative.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from dina_reward.checks.tensors import check_numbers, check_values_on_cpu
from dina_reward.checks.values import check_choice, check_fields, check_kind


LikelihoodName = Literal["thurstone", "bradley_terry"]
PreferenceLossName = Literal["thurstone_fidelity", "thurstone_nll", "bradley_terry", "gaussian"]

VARIANCE_EPS = 1e-6
LARGEST_VARIANCE = 1e30
PROBABILITY_EPS = 1e-6


class _LogNdtr(torch.autograd.Function):
    """``log Phi(z)``; the gradient of `torch.special.log_ndtr` is wrong in float32 below ``z = -50``."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return torch.special.log_ndtr(z)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * math.sqrt(2 / math.pi) / torch.special.erfcx(-z / math.sqrt(2))


def log_ndtr(z: Tensor) -> Tensor:
    """Logarithm of the standard normal distribution function, with finite gradients for any finite ``z``."""
    return _LogNdtr.apply(z)


def thurstone_preference(margin: Tensor, variance: Tensor) -> Tensor:
    """``P(a > b) = Phi(margin / sqrt(2 variance + 1e-6))``, elementwise.

    Args:
        margin (`Tensor`): ``s_a - s_b``.
        variance (`Tensor`): variance of one score, broadcast against ``margin``.
    """
    return torch.special.ndtr(_standardize(margin, variance))


def ensemble_level(noise_levels: Tensor) -> Tensor:
    """The one level that stands for an ensemble, a scalar: the root mean square.

    The Thurstone variance is linear in ``sigma^2``, so there it equals its mean over the levels.
    """
    return noise_levels.square().mean().sqrt()


class PreferenceModel(ABC):
    """From the scores of two latents to the probability that the first is preferred."""

    likelihood: ClassVar[LikelihoodName]

    @abstractmethod
    def probability(self, score_a: Tensor, score_b: Tensor, noise_level: Tensor) -> Tensor:
        """``P(a > b)``, shape ``(pairs,)``.

        Args:
            score_a, score_b (`Tensor`): raw scores, shape ``(pairs,)``.
            noise_level (`Tensor`): level both were scored at, shape ``(pairs,)`` or a scalar; of an ensemble, its
                `ensemble_level`.
        """


@dataclass(frozen=True)
class BradleyTerryModel(PreferenceModel):
    """``P(a > b) = 1 / (1 + exp(-(s_a - s_b)))``, whatever the noise level."""

    likelihood: ClassVar[LikelihoodName] = "bradley_terry"

    def probability(self, score_a: Tensor, score_b: Tensor, noise_level: Tensor) -> Tensor:
        return torch.sigmoid(_margin(score_a, score_b))


@dataclass(frozen=True)
class ThurstoneModel(PreferenceModel):
    """``P(a > b) = Phi((s_a - s_b) / sqrt(2 var(sigma) + 1e-6))`` with ``var(sigma) = k sigma^2 + c`` (arXiv 2602.11146).

    With ``variance_scale=0`` it is the classic Thurstone model of fixed variance ``c``.

    Examples:
        >>> ThurstoneModel().probability(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([0.4]))
        tensor([0.8775])

    Args:
        variance_scale (`float`): ``k``.
        variance_offset (`float`): ``c``.
    """

    likelihood: ClassVar[LikelihoodName] = "thurstone"

    variance_scale: float = 2.0
    variance_offset: float = 0.05

    def __post_init__(self) -> None:
        check_fields(self)
        if not (0 <= self.variance_scale <= LARGEST_VARIANCE and 0 < self.variance_offset <= LARGEST_VARIANCE):
            raise ValueError(
                "the Thurstone variance k sigma^2 + c needs variance_scale >= 0 and variance_offset > 0, both finite in "
                f"float32 (at most {LARGEST_VARIANCE:g}), got {self.variance_scale} and {self.variance_offset}"
            )

    def variance(self, noise_level: Tensor) -> Tensor:
        """Score variance ``k sigma^2 + c`` at each noise level, same shape."""
        return self.variance_scale * noise_level**2 + self.variance_offset

    def standardized_margin(self, score_a: Tensor, score_b: Tensor, noise_level: Tensor) -> Tensor:
        """``z = (s_a - s_b) / sqrt(2 var(sigma) + 1e-6)``, shape ``(pairs,)``, so that ``P(a > b) = Phi(z)``."""
        margin = _margin(score_a, score_b)
        _check_levels(noise_level, len(margin))
        return _standardize(margin, self.variance(noise_level.to(margin)))

    def probability(self, score_a: Tensor, score_b: Tensor, noise_level: Tensor) -> Tensor:
        return torch.special.ndtr(self.standardized_margin(score_a, score_b, noise_level))


def preference_model(
    likelihood: LikelihoodName, variance_scale: float = 2.0, variance_offset: float = 0.05
) -> PreferenceModel:
    """The likelihood of this name.

    Args:
        likelihood: ``"thurstone"`` or ``"bradley_terry"``.
        variance_scale, variance_offset: of `ThurstoneModel`.

    Raises:
        ValueError: unknown likelihood.
    """
    if likelihood not in get_args(LikelihoodName):
        raise ValueError(f"unknown likelihood {likelihood!r}; choose one of {', '.join(get_args(LikelihoodName))}")
    if likelihood == "bradley_terry":
        return BradleyTerryModel()
    return ThurstoneModel(variance_scale, variance_offset)


@dataclass(frozen=True)
class PreferenceLoss:
    """Loss of one batch of pairs, ``mean_i weight_i * loss_i``, for hard or soft targets ``q`` in ``[0, 1]``.

    With ``z`` the standardised margin of `ThurstoneModel`, ``p = Phi(z)`` and ``m = s_chosen - s_rejected``:

    | name | loss of a pair |
    |---|---|
    | ``thurstone_fidelity`` | ``1 - sqrt(q (p + 1e-6)) - sqrt((1 - q) (1 - p + 1e-6))`` |
    | ``thurstone_nll`` | ``-q log p - (1 - q) log(1 - p)`` |
    | ``bradley_terry`` | ``-q log sigmoid(m - margin) - (1 - q) log sigmoid(-m - margin)`` |
    | ``gaussian`` | ``((s_chosen - y_chosen)^2 + (s_rejected - y_rejected)^2) / (2 (k sigma^2 + c))`` |

    ``thurstone_fidelity`` with ``q = 1`` is the published loss. It saturates on badly misordered pairs (their gradient
    vanishes, which forgives wrong labels); ``thurstone_nll`` does not. Where people prefer the chosen side with probability
    ``pi`` and a pair has one vote, its mean is least at ``p = pi^2 / (pi^2 + (1 - pi)^2)``: probabilities come out too
    sure. With shares of votes as ``q`` it is least at ``p = q``, and so is ``thurstone_nll`` with either.
    ``variance_scale=0, variance_offset=0.5`` is the fixed-variance ablation of the paper.

    ``gaussian`` regresses on scores ``y`` of a judge: the negative log-likelihood of ``y ~ N(s, k sigma^2 + c)`` without its
    constant. The difference of two such scores has the Thurstone model's variance, so preferences keep their meaning.

    Args:
        name (`str`): one of the above.
        thurstone (`ThurstoneModel`): variance model; ``bradley_terry`` does not look at it.
        margin (`float`): margin of ``bradley_terry``.
    """

    name: PreferenceLossName = "thurstone_fidelity"
    thurstone: ThurstoneModel = ThurstoneModel()
    margin: float = 0.0

    def __post_init__(self) -> None:
        check_choice("preference loss", self.name, get_args(PreferenceLossName))
        check_fields(self)
        check_kind("thurstone", self.thurstone, ThurstoneModel)
        if self.margin and self.name != "bradley_terry":
            raise ValueError(f"margin={self.margin} belongs to the loss 'bradley_terry'; {self.name!r} has none")
        if self.margin < 0:
            raise ValueError(f"margin must not be negative, got {self.margin}")

    def __call__(
        self,
        score_chosen: Tensor,
        score_rejected: Tensor,
        noise_level: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        judged: Tensor | None = None,
    ) -> Tensor:
        """Weighted mean over the batch, a scalar. Weights multiply and are not renormalised.

        Kinds and shapes are checked in every call. Values are looked at on the CPU alone: on an accelerator that would wait
        for the device in every step, and a NaN shows in the loss that is returned.

        Args:
            score_chosen, score_rejected (`Tensor`): scores, floating point, shape ``(pairs,)``.
            noise_level (`Tensor`): level in ``[0, 1]`` that both sides of a pair were scored at, shape ``(pairs,)`` or a
                scalar.
            target (`Tensor`, *optional*): probability that the chosen side is really preferred, shape ``(pairs,)``;
                one by default, ``0.5`` for a tie.
            weight (`Tensor`, *optional*): not negative, shape ``(pairs,)``; one by default.
            judged (`Tensor`, *optional*): what a judge scored the two sides, shape ``(pairs, 2)``; needed by ``gaussian``.

        Raises:
            ValueError: a tensor is of another kind or shape, or (on the CPU) holds NaN or values out of its range.
        """
        losses = self.per_pair(score_chosen, score_rejected, noise_level, target, judged)
        if weight is not None:
            _check_by_pair("weight", weight, len(losses), math.inf)
        return losses.mean() if weight is None else (losses * weight.to(losses)).mean()

    def per_pair(
        self,
        score_chosen: Tensor,
        score_rejected: Tensor,
        noise_level: Tensor,
        target: Tensor | None = None,
        judged: Tensor | None = None,
    ) -> Tensor:
        """Loss of every pair, shape ``(pairs,)``; arguments as for the call.

        Raises:
            ValueError: as for the call, or ``gaussian`` gets no scores of a judge.
        """
        margin = _margin(score_chosen, score_rejected)
        _check_levels(noise_level, len(margin))
        if target is not None:
            _check_by_pair("target", target, len(margin), 1.0)
        if self.name == "gaussian":
            return self._regression(score_chosen, score_rejected, noise_level, judged)
        target = torch.ones_like(margin) if target is None else target.to(margin)
        if self.name == "bradley_terry":
            return _bradley_terry(margin, target, self.margin)
        return _THURSTONE_LOSSES[self.name](
            self.thurstone.standardized_margin(score_chosen, score_rejected, noise_level), target
        )

    def _regression(
        self, score_chosen: Tensor, score_rejected: Tensor, noise_level: Tensor, judged: Tensor | None
    ) -> Tensor:
        scores = torch.stack([score_chosen, score_rejected], dim=1).to(
            torch.promote_types(score_chosen.dtype, torch.float32)
        )
        if judged is not None:
            check_numbers("judged", judged)
            check_values_on_cpu("judged", judged)
        if judged is None or judged.shape != scores.shape:
            found = "none" if judged is None else f"shape {tuple(judged.shape)}"
            raise ValueError(
                f"the loss 'gaussian' needs a judge's scores of both sides of every pair, shape {tuple(scores.shape)}, got "
                f"{found}; give the dataset the columns score_chosen and score_rejected, or choose a preference loss"
            )
        squares = (scores - judged.to(scores)).square().sum(dim=1)
        return squares / (2 * self.thurstone.variance(noise_level.to(scores)) + VARIANCE_EPS)

    def of_preferences(self) -> PreferenceLoss:
        """What says of preferences what this loss says: for ``gaussian`` the negative log-likelihood they then have."""
        return replace(self, name="thurstone_nll") if self.name == "gaussian" else self

    @property
    def likelihood(self) -> LikelihoodName:
        """Name of the likelihood that this loss fits."""
        return "bradley_terry" if self.name == "bradley_terry" else "thurstone"

    def probability(self, score_chosen: Tensor, score_rejected: Tensor, noise_level: Tensor) -> Tensor:
        """``P(chosen > rejected)`` under the likelihood that this loss fits, shape ``(pairs,)``."""
        model = BradleyTerryModel() if self.likelihood == "bradley_terry" else self.thurstone
        return model.probability(score_chosen, score_rejected, noise_level)


def _standardize(margin: Tensor, variance: Tensor) -> Tensor:
    return margin / torch.sqrt(2 * variance + VARIANCE_EPS)


def _check_by_pair(name: str, values: Any, pairs: int, high: float, *, scalar: bool = False) -> None:
    """One number in ``[0, high]`` per pair."""
    check_numbers(name, values)
    if values.shape != (pairs,) and not (scalar and values.ndim == 0):
        raise ValueError(f"{name} must have one value per pair, shape ({pairs},), got {tuple(values.shape)}")
    check_values_on_cpu(name, values, 0.0, high)


def _check_levels(noise_level: Any, pairs: int) -> None:
    _check_by_pair("noise_level", noise_level, pairs, 1.0, scalar=True)


def _margin(score_a: Tensor, score_b: Tensor) -> Tensor:
    for side in (score_a, score_b):
        check_numbers("scores", side, floating=True)
    if score_a.shape != score_b.shape or score_a.ndim != 1:
        raise ValueError(
            "scores of the two sides must both have shape (pairs,), "
            f"got {tuple(score_a.shape)} and {tuple(score_b.shape)}"
        )
    if score_a.device != score_b.device:
        raise ValueError(f"the scores of the two sides are on {score_a.device} and {score_b.device}")
    for side in (score_a, score_b):
        check_values_on_cpu("scores", side)
    dtype = torch.promote_types(score_a.dtype, torch.float32)
    return score_a.to(dtype) - score_b.to(dtype)


def _fidelity(z: Tensor, target: Tensor) -> Tensor:
    # sqrt(target) is a factor of its own: no gradient flows into it, and sqrt has none at 0.
    preferred = target.sqrt() * (torch.special.ndtr(z) + PROBABILITY_EPS).sqrt()
    other = (1 - target).sqrt() * (torch.special.ndtr(-z) + PROBABILITY_EPS).sqrt()
    return 1 - preferred - other


def _nll(z: Tensor, target: Tensor) -> Tensor:
    return -(target * log_ndtr(z) + (1 - target) * log_ndtr(-z))


def _bradley_terry(margin: Tensor, target: Tensor, required: float) -> Tensor:
    softplus = torch.nn.functional.softplus
    return target * softplus(required - margin) + (1 - target) * softplus(required + margin)


_THURSTONE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "thurstone_fidelity": _fidelity,
    "thurstone_nll": _nll,
}
