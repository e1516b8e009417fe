"""Noise processes: how a latent is noised, and how a noise level maps to the timestep its model expects.

Everywhere in this package a *noise level* is the standard deviation of the noise in the model's own process, in
``[0, 1]``: ``0`` is a clean latent and ``1`` is pure noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dina_reward.checks.values import check_fields, scheduler_config_checked


_DDPM_PREDICTIONS = ("epsilon", "sample", "v_prediction")

LevelDistribution = Literal["uniform", "logit_normal", "mode", "constant", "power", "beta"]


@dataclass(frozen=True)
class NoisePoint:
    """Grid points of a noise process, one per row.

    Args:
        level (`Tensor`): noise standard deviation, shape ``(batch,)``, float32.
        timestep (`Tensor`): the scheduler's timestep of the same index, shape ``(batch,)``, float32.
    """

    level: Tensor
    timestep: Tensor


def expand_as(values: Tensor, target: Tensor) -> Tensor:
    """Appends dimensions of size one to ``(batch,)`` values until they broadcast against ``target``."""
    return values.reshape(values.shape + (1,) * (target.ndim - values.ndim))


def _vector(name: str, values: Any) -> Tensor:
    """Numbers as a 1-D tensor, float32, on the CPU.

    Raises:
        ValueError: no number, a table of them, or what has no order of its own.
    """
    try:
        if isinstance(values, (bool, str, bytes, Mapping, Set)):
            raise TypeError(values)
        given = torch.as_tensor(values, device="cpu")
        if given.dtype == torch.bool or given.is_complex():
            raise TypeError(values)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number or a sequence of numbers, got {str(values)[:80]!r}") from None
    if given.ndim > 1 or given.numel() == 0:
        raise ValueError(f"{name} must be one number or a sequence with at least one, got shape {tuple(given.shape)}")
    return torch.atleast_1d(given.float())


class NoiseProcess(ABC):
    """``x_level = a(level) * x_0 + level * eps`` on the grid of a training scheduler.

    The grid is built from a scheduler's *configuration*: the scheduler object of a pipeline has been altered by
    ``set_timesteps``. A requested level snaps to the nearest grid entry; the timestep is the one of the same index.

    Args:
        levels (`Tensor`): noise levels of the grid, shape ``(num_train_timesteps,)``.
        timesteps (`Tensor`): timesteps of the grid, same shape.
    """

    def __init__(self, levels: Tensor, timesteps: Tensor) -> None:
        if levels.shape != timesteps.shape or levels.ndim != 1:
            raise ValueError(
                f"levels and timesteps must be 1-D and of one length, got {tuple(levels.shape)}, {tuple(timesteps.shape)}"
            )
        self.levels = levels.to("cpu", torch.float32)
        self.timesteps = timesteps.to("cpu", torch.float32)

    @classmethod
    @abstractmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> NoiseProcess:
        """Builds the grid of a freshly made training scheduler with this configuration."""

    @abstractmethod
    def signal(self, level: Tensor) -> Tensor:
        """Coefficient ``a(level)`` of the clean latent, same shape as ``level``."""

    def snap(self, noise_level: float | Sequence[float] | Tensor) -> NoisePoint:
        """Nearest grid point of each requested level, on the CPU.

        Args:
            noise_level: one level or a 1-D collection of levels in ``[0, 1]``.

        Raises:
            ValueError: a level is not finite or lies outside ``[0, 1]``. Values above 1 are usually timesteps.
        """
        wanted = _vector("noise_level", noise_level)
        if not bool(((wanted >= 0) & (wanted <= 1)).all()):
            raise ValueError(
                f"noise_level must lie in [0, 1] (0 is clean, 1 is pure noise), got {wanted.tolist()}. "
                "Pass `timesteps=` if these are scheduler timesteps."
            )
        return self._at((self.levels[None, :] - wanted[:, None]).abs().argmin(dim=1))

    def from_timesteps(self, timesteps: float | Sequence[float] | Tensor) -> NoisePoint:
        """Grid point nearest to each scheduler timestep, on the CPU.

        Raises:
            ValueError: a timestep lies outside the grid. Values that are all below 1 are usually noise levels.
        """
        wanted = _vector("timesteps", timesteps)
        low, high = float(self.timesteps.min()), float(self.timesteps.max())
        if bool(((wanted > 0) & (wanted < 1)).all()):
            raise ValueError(
                f"timesteps {wanted.tolist()} lie between 0 and 1, where the grid goes up to {high:.4g}; if these are noise "
                "levels, pass them as `noise_level=`"
            )
        # Schedulers may round their timesteps to integers.
        if bool(((wanted > 0) & (wanted < low - 1)).any()):
            raise ValueError(
                f"timesteps {wanted.tolist()} lie below the scheduler's lowest, {low:.4g}; a clean latent is at 0, and "
                "noise levels are given as `noise_level=`"
            )
        if not bool(((wanted >= 0) & (wanted <= high + 1)).all()):
            raise ValueError(
                f"timesteps must lie in the scheduler's range [{low:.4g}, {high:.4g}], got {wanted.tolist()}. "
                "Pass `noise_level=` if these are noise levels."
            )
        return self._at((self.timesteps[None, :] - wanted[:, None]).abs().argmin(dim=1))

    def _at(self, index: Tensor) -> NoisePoint:
        return NoisePoint(level=self.levels[index], timestep=self.timesteps[index])

    def add_noise(self, latents: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """``a(level) * latents + level * noise``.

        Args:
            latents (`Tensor`): clean latents, shape ``(batch, ...)``.
            noise (`Tensor`): standard normal noise of the same shape.
            level (`Tensor`): shape ``(batch,)``.
        """
        level = level.to(latents.device, torch.float32)
        noisy = expand_as(self.signal(level), latents) * latents + expand_as(level, latents) * noise
        return noisy.to(latents.dtype)


class FlowMatchingNoise(NoiseProcess):
    """Rectified flow, ``x_sigma = (1 - sigma) x_0 + sigma eps`` (arXiv 2209.03003)."""

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> FlowMatchingNoise:
        if not is_flow_matching(config):
            raise ValueError(
                "this model is a flow-matching one, but the scheduler is a DDPM's (it has betas); pass `scheduler=` with "
                "the model's own"
            )
        scheduler = flow_matching_scheduler(config)
        return cls(levels=scheduler.sigmas, timesteps=scheduler.timesteps)

    def signal(self, level: Tensor) -> Tensor:
        return 1 - level


class VariancePreservingNoise(NoiseProcess):
    """DDPM, ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps`` with level ``sqrt(1 - abar_t)`` (arXiv 2006.11239)."""

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> VariancePreservingNoise:
        from diffusers import DDPMScheduler

        if is_flow_matching(config) and config.get("prediction_type") not in _DDPM_PREDICTIONS:
            raise ValueError(
                "this model is a DDPM, but the scheduler is a flow-matching one; pass `scheduler=` with the model's own"
            )
        scheduler = DDPMScheduler.from_config(dict(config))
        levels = (1 - scheduler.alphas_cumprod).sqrt()
        return cls(levels=levels, timesteps=torch.arange(len(levels), device=levels.device))

    def signal(self, level: Tensor) -> Tensor:
        return (1 - level**2).clamp(min=0).sqrt()


def is_flow_matching(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a scheduler configuration describes flow matching: flow sigmas, or neither betas nor a DDPM prediction.

    Raises:
        ValueError: it describes neither flow matching nor DDPM; see `check_known_process`.
    """
    check_known_process(scheduler_config_checked(scheduler_config))
    if scheduler_config.get("use_flow_sigmas") or scheduler_config.get("prediction_type") == "flow_prediction":
        return True
    return "beta_schedule" not in scheduler_config and "beta_start" not in scheduler_config


def check_known_process(scheduler_config: Mapping[str, Any], name: str = "this scheduler") -> None:
    """Refuses schedulers of processes that are neither DDPM nor flow matching.

    EDM (arXiv 2206.00364; Playground v2.5), consistency and variance-exploding models add noise without weakening the
    signal, TrigFlow ones along a circle: neither their levels nor their steps are those of the two processes here.

    Args:
        name: of the scheduler, for the message.

    Raises:
        ValueError: naming the scheduler.
    """
    has_betas = "beta_schedule" in scheduler_config or "beta_start" in scheduler_config
    exploding = scheduler_config.get("sigma_max") is not None and not has_betas
    if scheduler_config.get("sigma_data") is not None or exploding:
        raise ValueError(
            f"{name} belongs to models that are neither DDPM nor flow matching (EDM, consistency, TrigFlow: it has "
            "sigma_data or sigma_max); rewards and policies on such models are not supported"
        )


def flow_matching_scheduler(config: Mapping[str, Any]) -> Any:
    """Fresh `FlowMatchEulerDiscreteScheduler` on the noise levels of any flow-matching scheduler's configuration.

    Multistep solvers that were given flow sigmas (``use_flow_sigmas``: UniPC, DPM-Solver++) call their shift
    ``flow_shift``.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if config.get("use_flow_sigmas"):
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config["num_train_timesteps"], shift=config.get("flow_shift") or 1.0
        )
    return FlowMatchEulerDiscreteScheduler.from_config(dict(config))


@dataclass(frozen=True)
class LevelSampler:
    """Distribution of training noise levels over ``[0, 1]``.

    | name | level from ``u ~ U(0, 1)`` |
    |---|---|
    | ``uniform`` | ``u`` |
    | ``logit_normal`` | ``sigmoid(mean + std * n)``, ``n ~ N(0, 1)`` |
    | ``mode`` | ``1 - u - s (cos^2(pi u / 2) - 1 + u)`` (arXiv 2403.03206) |
    | ``constant`` | ``value`` |
    | ``power`` | ``u ** exponent`` |
    | ``beta`` | ``Beta(alpha, beta)`` |

    Examples:
        >>> LevelSampler("logit_normal", mean=0.0, std=1.0).sample(16, generator=torch.Generator().manual_seed(0))
    """

    distribution: LevelDistribution = "uniform"
    mean: float = 0.0
    std: float = 1.0
    mode_scale: float = 1.29
    value: float = 0.4
    exponent: float = 2.0
    alpha: float = 2.0
    beta: float = 2.0

    def __post_init__(self) -> None:
        known = LevelDistribution.__args__  # type: ignore[attr-defined]
        if self.distribution not in known:
            raise ValueError(f"unknown level distribution {self.distribution!r}; choose one of {', '.join(known)}")
        check_fields(self)
        for name in ("std", "exponent", "alpha", "beta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"LevelSampler.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.value <= 1:
            raise ValueError(f"LevelSampler.value must lie in [0, 1], got {self.value}")

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws levels on the CPU, shape ``(batch_size,)``, float32."""
        plain: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
        u = torch.rand(batch_size, generator=generator, **plain)
        if self.distribution == "uniform":
            return u
        if self.distribution == "logit_normal":
            return torch.sigmoid(self.mean + self.std * torch.randn(batch_size, generator=generator, **plain))
        if self.distribution == "mode":
            return (1 - u - self.mode_scale * (torch.cos(torch.pi * u / 2) ** 2 - 1 + u)).clamp(0, 1)
        if self.distribution == "constant":
            return torch.full((batch_size,), self.value, **plain)
        if self.distribution == "power":
            return u**self.exponent
        return self._sample_beta(batch_size, generator)

    def _sample_beta(self, batch_size: int, generator: torch.Generator | None) -> Tensor:
        shapes = torch.tensor([self.alpha, self.beta], device="cpu", dtype=torch.float32).expand(batch_size, 2)
        gammas = torch._standard_gamma(shapes, generator=generator)
        return gammas[:, 0] / gammas.sum(dim=1)
