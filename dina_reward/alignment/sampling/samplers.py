"""Samplers as policies: a grid, the deterministic step, and the stochastic step whose log-probability is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.sampling.ddim import PredictionType, ddim_transition, split_prediction
from dina_reward.alignment.sampling.steps import (
    SDEType,
    StepOutput,
    Transition,
    check_eta,
    euler_step,
    gaussian_log_prob,
    log_prob,
    transition,
)
from dina_reward.noise import check_known_process, flow_matching_scheduler, is_flow_matching


SetTimesteps = Callable[[Any, int], None]
"""``set_timesteps(fresh scheduler, num_inference_steps)``: the grid a pipeline would use, on the CPU."""


class Sampler(ABC):
    """Discretisation of a generator's reverse process.

    ``prediction`` is everywhere the raw model output: velocity of flow models, epsilon, sample or v of DDPM models.
    Levels stay on the CPU, where reading one costs no synchronisation; timesteps live on the model's device.

    Args:
        timesteps (`Tensor`): what the model is told at each step, shape ``(num_steps,)``, float32.
        levels (`Tensor`): noise level of the state before each step and after the last one, shape ``(num_steps + 1,)``.
        sde_type (`str`): kind of the stochastic step.
        eta (`float`): strength of its noise; 0 allows only deterministic steps.
    """

    def __init__(self, timesteps: Tensor, levels: Tensor, sde_type: SDEType, eta: float) -> None:
        self.timesteps = timesteps
        self.levels = levels
        self.sde_type = sde_type
        self.eta = eta

    def __len__(self) -> int:
        return self.timesteps.shape[0]

    @property
    @abstractmethod
    def signal(self) -> Tensor:
        """Factor of the clean latent in the state before each step and after the last one, as `levels` that of the noise."""

    @abstractmethod
    def step(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        """Deterministic step ``index``: next latents, shape ``(batch, ...)``, float32, differentiable."""

    @abstractmethod
    def predict_clean(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        """``x_0 hat`` at step ``index``, shape ``(batch, ...)``, float32, differentiable."""

    @abstractmethod
    def move_clean(self, index: int, prediction: Tensor, shift: Tensor) -> Tensor:
        """The prediction whose `predict_clean` at step ``index`` lies further by ``shift``, same shape, float32."""

    @abstractmethod
    def transition(self, index: int, latents: Tensor, prediction: Tensor) -> Transition:
        """Distribution of the next latents at stochastic step ``index``.

        Raises:
            ValueError: ``eta`` is 0, or the step would add no noise: neither has a log-probability.
        """

    @abstractmethod
    def log_prob(self, transition: Transition, next_latents: Tensor) -> Tensor:
        """Mean over latent elements of the log-density of ``next_latents``, shape ``(batch,)``, float32."""

    def take_step(
        self, index: int, latents: Tensor, prediction: Tensor, *, noise: Tensor, dtype: torch.dtype
    ) -> StepOutput:
        """Draws the next latents, ``mean + std noise``, rounded to ``dtype`` before their log-probability is taken."""
        step = self.transition(index, latents, prediction)
        next_latents = (step.mean + step.std * noise.float()).to(dtype)
        return StepOutput(next_latents, self.log_prob(step, next_latents), step)

    def replay_step(self, index: int, latents: Tensor, prediction: Tensor, *, next_latents: Tensor) -> StepOutput:
        """Log-probability, under this prediction, of a step that was taken before."""
        step = self.transition(index, latents, prediction)
        return StepOutput(next_latents, self.log_prob(step, next_latents), step)


class FlowSampler(Sampler):
    """Flow matching: Euler steps, and ``"flow_sde"``, ``"dance_sde"`` or ``"cps"`` as stochastic ones.

    Args:
        sigmas (`Tensor`): noise levels, shape ``(num_steps + 1,)``, float32, ending at 0.
        timesteps (`Tensor`): shape ``(num_steps,)``, float32.
        sde_type, eta: see `dina_reward.alignment.sampling.steps`.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor, sde_type: SDEType = "cps", eta: float = 0.0) -> None:
        super().__init__(timesteps, sigmas, sde_type, eta)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        num_inference_steps: int,
        *,
        sde_type: SDEType = "cps",
        eta: float = 0.0,
        device: torch.device | str = "cpu",
        set_timesteps: SetTimesteps | None = None,
    ) -> FlowSampler:
        """Copies the grid that a fresh scheduler of this configuration makes; ``scheduler`` itself is not altered.

        The sigmas are never recomputed: with a static shift, `set_timesteps` shifts its end point a second time.
        Multistep solvers with flow sigmas (UniPC, DPM-Solver++) give their own grid, on which Euler steps are taken.

        Raises:
            ValueError: the scheduler shifts by image size, and ``set_timesteps`` is not given.
        """
        solver = bool(scheduler.config.get("use_flow_sigmas"))
        fresh = type(scheduler).from_config(scheduler.config) if solver else flow_matching_scheduler(scheduler.config)
        shifts_by_size = fresh.config.get("use_dynamic_shifting")
        if set_timesteps is not None and (shifts_by_size or not solver):
            set_timesteps(fresh, num_inference_steps)
        elif shifts_by_size:
            raise ValueError(
                "this scheduler has use_dynamic_shifting=True, so its grid depends on the image size: use "
                "`Policy.sampler`, which knows it, or pass `set_timesteps=`"
            )
        else:
            fresh.set_timesteps(num_inference_steps, device="cpu")
        sigmas = fresh.sigmas.to("cpu", torch.float32, copy=True)
        # Solvers that take logarithms start at 1 - 1e-6, where the diffusion of "flow_sde" would be enormous.
        sigmas[sigmas > 1 - 1e-5] = 1.0
        return cls(
            sigmas,
            fresh.timesteps.to(device, torch.float32, copy=True),
            sde_type,
            eta,
        )

    @property
    def signal(self) -> Tensor:
        return 1 - self.levels

    def step(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        return euler_step(latents, prediction, self.levels[index], self.levels[index + 1])

    def predict_clean(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        return latents.float() - self.levels[index] * prediction.float()

    def move_clean(self, index: int, prediction: Tensor, shift: Tensor) -> Tensor:
        return prediction.float() - shift.float() / self.levels[index]

    def transition(self, index: int, latents: Tensor, prediction: Tensor) -> Transition:
        return transition(self.sde_type, latents, prediction, self.levels[index], self.levels[index + 1], self.eta)

    def log_prob(self, transition: Transition, next_latents: Tensor) -> Tensor:
        return log_prob(self.sde_type, transition, next_latents)


class DDIMSampler(Sampler):
    """DDPM models: DDIM steps (arXiv 2010.02502), deterministic or with ``eta`` in ``(0, 1]``.

    Predicted clean latents are not clipped, as in `StableDiffusionPipeline`.

    Args:
        alphas_cumprod (`Tensor`): ``abar`` before each step and after the last one, shape ``(num_steps + 1,)``, float32.
        timesteps (`Tensor`): shape ``(num_steps,)``, float32.
        prediction_type: what the model predicts.
        eta: see above.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        timesteps: Tensor,
        prediction_type: PredictionType = "epsilon",
        eta: float = 0.0,
    ) -> None:
        super().__init__(timesteps, (1 - alphas_cumprod).clamp(min=0).sqrt(), "ddim", eta)
        self.alphas_cumprod = alphas_cumprod
        self.prediction_type = prediction_type

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, num_inference_steps: int, *, eta: float = 0.0, device: torch.device | str = "cpu"
    ) -> DDIMSampler:
        """The grid of a `DDIMScheduler` with the configuration of any DDPM scheduler (PNDM, DDPM, Euler, ...)."""
        from diffusers import DDIMScheduler

        fresh = DDIMScheduler.from_config(scheduler.config)
        fresh.set_timesteps(num_inference_steps, device="cpu")
        timesteps = fresh.timesteps
        stride = fresh.config.num_train_timesteps // num_inference_steps
        following = timesteps - stride
        after = torch.where(
            following >= 0, fresh.alphas_cumprod[following.clamp(min=0)], fresh.final_alpha_cumprod.float()
        )
        alphas = torch.cat([fresh.alphas_cumprod[timesteps[:1]], after]).float()
        if not torch.equal(alphas[:-1], fresh.alphas_cumprod[timesteps].float()):
            raise ValueError(_broken_grid(fresh.config, num_inference_steps))
        if fresh.config.prediction_type == "epsilon" and float(alphas.min()) < 1e-7:
            raise ValueError(
                "the first timestep is pure noise (rescale_betas_zero_snr), from which a model that predicts epsilon tells "
                "nothing about the image; set rescale_betas_zero_snr to false, or timestep_spacing to 'leading'"
            )
        return cls(alphas, timesteps.to(device, torch.float32), fresh.config.prediction_type, eta)

    @property
    def signal(self) -> Tensor:
        return self.alphas_cumprod.sqrt()

    def step(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        return self._transition(index, latents, prediction, eta=0.0).mean

    def predict_clean(self, index: int, latents: Tensor, prediction: Tensor) -> Tensor:
        return split_prediction(latents, prediction, self.alphas_cumprod[index], self.prediction_type)[0]

    def move_clean(self, index: int, prediction: Tensor, shift: Tensor) -> Tensor:
        if self.prediction_type == "sample":
            return prediction.float() + shift.float()
        signal, noise = self.alphas_cumprod[index].sqrt(), self.levels[index]
        factor = signal / noise if self.prediction_type == "epsilon" else 1 / noise
        return prediction.float() - factor * shift.float()

    def transition(self, index: int, latents: Tensor, prediction: Tensor) -> Transition:
        check_eta("ddim", self.eta)
        step = self._transition(index, latents, prediction, eta=self.eta)
        if not bool(step.std > 0):
            raise ValueError(
                f"DDIM step {index} of {len(self)} adds no noise (it ends at a clean latent), so it has no "
                "log-probability; take it with `step`"
            )
        return step

    def _transition(self, index: int, latents: Tensor, prediction: Tensor, eta: float) -> Transition:
        return ddim_transition(
            latents,
            prediction,
            self.alphas_cumprod[index],
            self.alphas_cumprod[index + 1],
            eta,
            self.prediction_type,
        )

    def log_prob(self, transition: Transition, next_latents: Tensor) -> Tensor:
        return gaussian_log_prob(transition, next_latents)


def _broken_grid(config: Any, steps: int) -> str:
    spacing, total = config.timestep_spacing, config.num_train_timesteps
    advice = "use timestep_spacing 'leading' or 'trailing'"
    if spacing == "trailing":
        divisors = [number for number in range(1, total + 1) if total % number == 0]
        below, above = max(n for n in divisors if n <= steps), min(n for n in divisors if n >= min(steps, total))
        advice = f"choose a divisor of num_train_timesteps {total}, such as {below} or {above}"
    return f"{steps} DDIM steps with timestep_spacing {spacing!r} do not lead from each timestep to the next one; {advice}"


def build_sampler(
    scheduler: Any,
    num_inference_steps: int,
    *,
    sde_type: SDEType | None = None,
    eta: float = 0.0,
    device: torch.device | str = "cpu",
    set_timesteps: SetTimesteps | None = None,
) -> Sampler:
    """Sampler that fits a pipeline's scheduler, on a fresh grid.

    Args:
        scheduler: of the pipeline; only its configuration is read.
        num_inference_steps: sampler steps.
        sde_type: kind of the stochastic steps; by default ``"ddim"`` for DDPM models and ``"cps"`` for flow matching.
        eta: strength of their noise; 0 if only deterministic steps are taken.
        set_timesteps: grid of a flow-matching scheduler that shifts by image size.

    Raises:
        ValueError: the scheduler is neither DDPM nor flow matching, the kind does not fit it, or ``eta`` the kind.
    """
    check_known_process(scheduler.config, type(scheduler).__name__)
    flow = is_flow_matching(scheduler.config)
    kind = sde_type or ("cps" if flow else "ddim")
    if (kind == "ddim") == flow:
        family = "a flow-matching" if flow else "a DDPM"
        fitting = "cps, flow_sde or dance_sde" if flow else "ddim"
        raise ValueError(f"sde_type is {kind!r} but {type(scheduler).__name__} is {family} scheduler; use {fitting}")
    if eta:
        check_eta(kind, eta)
    if flow:
        return FlowSampler.from_scheduler(
            scheduler, num_inference_steps, sde_type=kind, eta=eta, device=device, set_timesteps=set_timesteps
        )
    return DDIMSampler.from_scheduler(scheduler, num_inference_steps, eta=eta, device=device)
