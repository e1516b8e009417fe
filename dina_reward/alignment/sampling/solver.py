"""Deterministic steps that remember: the second-order solver that needs fewer evaluations of the denoiser."""

from __future__ import annotations

import math

from torch import Tensor

from dina_reward.alignment.sampling.samplers import Sampler


def check_order(order: int) -> None:
    """Refuses orders that `MultistepSolver` has no formula for.

    Raises:
        ValueError: neither 1 nor 2.
    """
    if order not in (1, 2):
        raise ValueError(f"solver_order must be 1 (Euler, DDIM) or 2 (DPM-Solver++ 2M), got {order!r}")


class MultistepSolver:
    """Takes the deterministic steps of a sampler, by its own first-order formula or by DPM-Solver++(2M), arXiv 2211.01095.

    At second order the step is that of the sampler (Euler, DDIM) with ``x_0 hat`` replaced by::

        D = x_0 hat + h_i / (2 h_{i-1}) (x_0 hat - x_0 hat before),    h_i = lambda_{i+1} - lambda_i,

    where ``lambda = log(signal / noise)``. The first step, a step to a clean latent and the step after pure noise are of
    first order, as in diffusers' `DPMSolverMultistepScheduler`.

    Args:
        sampler (`Sampler`): grid and first-order step.
        order (`int`): 1 or 2.

    Raises:
        ValueError: another order.
    """

    def __init__(self, sampler: Sampler, order: int = 1) -> None:
        check_order(order)
        self.sampler = sampler
        self.order = order
        self._before: tuple[int, Tensor] | None = None

    def step(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        """Next latents, shape ``(batch, ...)``, float32. Steps of a sample are taken in order."""
        if self.order == 1:
            return self.sampler.step(index, latents, prediction)
        clean, before = self.sampler.predict_clean(index, latents, prediction), self._before
        self._before = index, clean
        share = 0.0 if before is None or before[0] != index - 1 else self._share(index)
        if before is not None and share:
            prediction = self.sampler.move_clean(index, prediction, share * (clean - before[1]))
        return self.sampler.step(index, latents, prediction)

    def _share(self, index: int) -> float:
        """``h_i / (2 h_{i-1})``; 0 where one of the levels is pure noise or none."""
        before, now, after = (self._log_snr(number) for number in (index - 1, index, index + 1))
        if math.isinf(before) or math.isinf(after):
            return 0.0
        return (after - now) / (2 * (now - before))

    def _log_snr(self, index: int) -> float:
        signal, level = float(self.sampler.signal[index]), float(self.sampler.levels[index])
        if not signal or not level:
            return math.inf if signal else -math.inf
        return math.log(signal) - math.log(level)
