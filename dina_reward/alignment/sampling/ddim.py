"""One DDIM step of a variance-preserving sampler: its deterministic form, and the stochastic one with a known density.

Conventions: ``x = sqrt(abar) x_0 + sqrt(1 - abar) eps``; ``abar`` belongs to the current timestep and ``abar'`` to the next
one, which is closer to the clean latent. All arithmetic is float32.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dina_reward.alignment.sampling.steps import Transition


PredictionType = Literal["epsilon", "sample", "v_prediction"]


def split_prediction(
    latents: Tensor, prediction: Tensor, alpha_cumprod: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """``(x_0 hat, eps hat)`` of a model output.

    | type | the model predicts |
    |---|---|
    | ``epsilon`` | ``eps`` |
    | ``sample`` | ``x_0`` |
    | ``v_prediction`` | ``v = sqrt(abar) eps - sqrt(1 - abar) x_0`` (arXiv 2202.00512) |

    Args:
        latents, prediction (`Tensor`): shape ``(batch, ...)``.
        alpha_cumprod (`Tensor`): ``abar``, scalar or broadcastable, in ``(0, 1)``.

    Raises:
        ValueError: unknown prediction type.
    """
    latents, prediction = latents.float(), prediction.float()
    signal, noise = alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()
    if prediction_type == "epsilon":
        return (latents - noise * prediction) / signal, prediction
    if prediction_type == "sample":
        return prediction, (latents - signal * prediction) / noise
    if prediction_type == "v_prediction":
        return signal * latents - noise * prediction, signal * prediction + noise * latents
    raise ValueError(
        f"unknown prediction_type {prediction_type!r}; choose one of {', '.join(get_args(PredictionType))}"
    )


def ddim_transition(
    latents: Tensor,
    prediction: Tensor,
    alpha_cumprod: Tensor,
    alpha_cumprod_next: Tensor,
    eta: float,
    prediction_type: PredictionType = "epsilon",
) -> Transition:
    """Distribution of the next latents (DDIM, arXiv 2010.02502; as a policy, DDPO, arXiv 2305.13301).

    ``std = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar')``,
    ``mean = sqrt(abar') x_0 hat + sqrt(1 - abar' - std^2) eps hat``. ``eta = 0`` is the deterministic step.

    Args:
        latents, prediction (`Tensor`): shape ``(batch, ...)``.
        alpha_cumprod, alpha_cumprod_next (`Tensor`): ``abar`` and ``abar'``, scalars.
        eta (`float`): share of fresh noise, in ``[0, 1]``.
    """
    clean, noise = split_prediction(latents, prediction, alpha_cumprod, prediction_type)
    variance = (1 - alpha_cumprod_next) / (1 - alpha_cumprod) * (1 - alpha_cumprod / alpha_cumprod_next)
    std = eta * variance.clamp(min=0).sqrt()
    kept = (1 - alpha_cumprod_next - std**2).clamp(min=0).sqrt()
    mean = alpha_cumprod_next.sqrt() * clean + kept * noise
    return Transition(mean=mean, std=std, diffusion=std, delta=torch.ones_like(std))
