"""One step of a flow-matching sampler: the ODE, and three stochastic steps whose log-probability is known.

Conventions: ``sigma`` falls from 1 (noise) to 0 (latent), ``x = (1 - sigma) x_0 + sigma eps`` and the model predicts
``v = eps - x_0``. ``s`` is the current sigma, ``s'`` the next one and ``D = s' - s < 0``. All arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


SDEType = Literal["flow_sde", "dance_sde", "cps", "ddim"]


@dataclass(frozen=True)
class Transition:
    """Gaussian ``x' ~ N(mean, std^2)`` of a stochastic step.

    Args:
        mean (`Tensor`): shape ``(batch, ...)``, float32.
        std (`Tensor`): standard deviation, scalar, float32.
        diffusion (`Tensor`): the diffusion coefficient ``g``, scalar; ``std = g sqrt(-D)`` for the SDEs and ``std = g``
            for CPS and DDIM.
        delta (`Tensor`): ``-D`` of the SDEs, scalar; 1 where the step has no such factor (CPS, DDIM).
    """

    mean: Tensor
    std: Tensor
    diffusion: Tensor
    delta: Tensor


@dataclass(frozen=True)
class StepOutput:
    """A stochastic step that was taken or replayed.

    Args:
        next_latents (`Tensor`): ``x'`` in its storage dtype, shape ``(batch, ...)``.
        log_prob (`Tensor`): log-probability of exactly these ``next_latents``, shape ``(batch,)``, float32.
        transition (`Transition`): the distribution they came from.
    """

    next_latents: Tensor
    log_prob: Tensor
    transition: Transition


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """ODE step ``x' = x + D v``, float32; ``D x 1`` of `FlowMatchEulerDiscreteScheduler.step`."""
    return latents.float() + (sigma_next - sigma) * velocity.float()


def flow_sde_transition(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> Transition:
    """Flow-GRPO's SDE (arXiv 2505.05470).

    ``g = eta sqrt(s / (1 - s))``, where ``1 - s`` is replaced by ``1 - s'`` at ``s = 1``. It leaves white noise in the
    final latent when every step is stochastic; restrict it to an early window.
    """
    diffusion = eta * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_next, sigma)))
    return _sde_transition(latents, velocity, sigma, sigma_next, diffusion)


def dance_sde_transition(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> Transition:
    """DanceGRPO's SDE (arXiv 2505.07818): constant ``g = eta``."""
    return _sde_transition(latents, velocity, sigma, sigma_next, torch.full_like(sigma, eta))


def _sde_transition(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, diffusion: Tensor
) -> Transition:
    """``mean = x (1 + g^2 D / (2 s)) + v (1 + g^2 (1 - s) / (2 s)) D``, ``std = g sqrt(-D)``."""
    delta = sigma_next - sigma
    correction = diffusion**2 / (2 * sigma)
    mean = latents.float() * (1 + correction * delta) + velocity.float() * (1 + correction * (1 - sigma)) * delta
    return Transition(mean=mean, std=diffusion * torch.sqrt(-delta), diffusion=diffusion, delta=-delta)


def cps_transition(latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> Transition:
    """Coefficients-preserving sampling (arXiv 2509.05952): the noise after the step is ``s'`` in total.

    ``g = s' sin(eta pi / 2)``, ``mean = (1 - s') x0_hat + sqrt(s'^2 - g^2) x1_hat``, ``std = g`` with
    ``x0_hat = x - s v`` and ``x1_hat = x + (1 - s) v``.
    """
    latents, velocity = latents.float(), velocity.float()
    std = sigma_next * math.sin(eta * math.pi / 2)
    kept = sigma_next * math.cos(eta * math.pi / 2)
    mean = (1 - sigma_next) * (latents - sigma * velocity) + kept * (latents + (1 - sigma) * velocity)
    return Transition(mean=mean, std=std, diffusion=std, delta=torch.ones_like(std))


_TRANSITIONS: dict[str, Callable[..., Transition]] = {
    "flow_sde": flow_sde_transition,
    "dance_sde": dance_sde_transition,
    "cps": cps_transition,
}


def check_eta(sde_type: str, eta: float) -> None:
    """Refuses a sampler whose steps would have no log-probability.

    Raises:
        ValueError: unknown ``sde_type``, ``eta <= 0``, or ``eta > 1`` for CPS.
    """
    if sde_type not in get_args(SDEType):
        raise ValueError(f"unknown sde_type {sde_type!r}; choose one of {', '.join(get_args(SDEType))}")
    if not (eta > 0 and math.isfinite(eta)):
        raise ValueError(
            f"eta is {eta}: a deterministic step has no log-probability. Use eta > 0 for steps that are trained "
            "(0.7 for flow_sde, 0.3 for dance_sde, 0.8 for cps, 1 for ddim), or a deterministic step to sample the ODE."
        )
    if sde_type in ("cps", "ddim") and eta > 1:
        raise ValueError(f"eta is {eta}: {sde_type} takes 0 < eta <= 1, the share of noise that is drawn anew")


def transition(
    sde_type: SDEType, latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float
) -> Transition:
    """Distribution of the next latents.

    Args:
        sde_type: ``"flow_sde"``, ``"dance_sde"`` or ``"cps"``.
        latents, velocity (`Tensor`): ``x`` and ``v``, shape ``(batch, ...)``.
        sigma, sigma_next (`Tensor`): scalars, float32, ``sigma > sigma_next > 0``.
        eta (`float`): strength of the noise.

    Raises:
        ValueError: see `check_eta`; or the step ends at ``sigma = 0``, where nothing should be added to the latent.
    """
    check_eta(sde_type, eta)
    if sde_type not in _TRANSITIONS:
        raise ValueError(
            f"{sde_type!r} is not a step of a flow-matching sampler; see `dina_reward.alignment.sampling.ddim`"
        )
    if not bool(sigma > sigma_next) or not bool(sigma_next > 0):
        raise ValueError(
            f"a stochastic step needs sigma > sigma_next > 0, got {float(sigma):.6g} -> {float(sigma_next):.6g}; "
            "take the last step with `euler_step`"
        )
    return _TRANSITIONS[sde_type](latents, velocity, sigma, sigma_next, eta)


def log_prob(sde_type: SDEType, transition: Transition, next_latents: Tensor) -> Tensor:
    """Log-probability of ``next_latents``: the *mean* over latent elements, as all published clip ranges assume.

    The SDEs use the Gaussian density. CPS follows its published code, ``-mean((x' - mean)^2)`` without the factor
    ``1 / (2 std^2)`` and constants, so its clip range is not comparable with that of the SDEs.

    Returns:
        `Tensor` of shape ``(batch,)``, float32.
    """
    if sde_type != "cps":
        return gaussian_log_prob(transition, next_latents)
    return -((next_latents.float() - transition.mean) ** 2).flatten(start_dim=1).mean(dim=1)


def gaussian_log_prob(transition: Transition, next_latents: Tensor) -> Tensor:
    """Log-density of ``N(mean, std^2)``, mean over latent elements, shape ``(batch,)``, float32."""
    std = transition.std
    squared_error = (next_latents.float() - transition.mean) ** 2
    density = squared_error / (2 * std**2) + torch.log(std) + 0.5 * math.log(2 * math.pi)
    return -density.flatten(start_dim=1).mean(dim=1)
