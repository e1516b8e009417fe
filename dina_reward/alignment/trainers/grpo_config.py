"""Configurations of the policy-gradient trainers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from transformers.utils import logging

from dina_reward.alignment.objectives.policy_gradient import KLKind, check_kl_kind, check_objective_fits, get_objective
from dina_reward.alignment.sampling.rollout import WindowSchedule, check_sde_window, trained_steps
from dina_reward.alignment.sampling.steps import SDEType, check_eta
from dina_reward.alignment.trainers.joint import JointTimestepsConfig
from dina_reward.checks.values import check_choice, check_int, check_real, is_int


logger = logging.get_logger(__name__)

CreditAssignment = Literal["terminal", "gain"]


@dataclass
class DiffusionGRPOConfig(JointTimestepsConfig):
    """Settings of group-relative policy optimisation (Flow-GRPO and its kin, and GRPO on DDPM models)."""

    loss_type: str = field(
        default="ppo_clip", metadata={"help": "Objective: 'ppo_clip', 'grpo_guard' or 'policy_gradient'."}
    )
    epsilon: float = field(
        default=1e-4,
        metadata={"help": "Clip range of the ratio. Log-probs are means over latent elements, so it is tiny."},
    )
    epsilon_high: float | None = field(
        default=None, metadata={"help": "Upper clip range (clip-higher). Default: epsilon."}
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clamped to +- this value."})
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL to the model without LoRA. 0 builds no reference."}
    )
    kl_kind: KLKind = field(
        default="flow_grpo",
        metadata={"help": "Definition of the KL that beta multiplies: 'step', 'flow_grpo' or 'velocity'."},
    )
    credit: CreditAssignment = field(
        default="terminal",
        metadata={
            "help": "'terminal': every step gets the advantage of the final latent; 'gain': each step gets its own, from "
            "the rewards of the clean latents predicted along the trajectory: one reward call more per trained step."
        },
    )
    credit_discount: float = field(
        default=0.0,
        metadata={"help": "With credit 'gain': 0 counts a step's own gain, 1 all gains from there to the end."},
    )

    sde_type: SDEType = field(
        default="cps",
        metadata={
            "help": "Stochastic step: 'cps', 'flow_sde' or 'dance_sde' for flow matching, 'ddim' for DDPM models. CPS "
            "leaves no noise behind."
        },
    )
    eta: float = field(
        default=0.8,
        metadata={"help": "Noise strength of the sampler's stochastic steps (not the reward's noise level)."},
    )
    sde_window_size: int | None = field(
        default=3, metadata={"help": "Stochastic steps per generation. None: all of sde_window_range."}
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "Steps [low, high) that the window lies in. Default: the first half for flow matching, all but the last "
            "for DDIM."
        },
    )
    sde_window_schedule: WindowSchedule = field(
        default="random", metadata={"help": "Where the window lies: 'random', 'fixed' or 'sliding' (MixGRPO)."}
    )
    sde_window_interval: int = field(
        default=1, metadata={"help": "With 'sliding': generations between two moves of the window."}
    )
    sde_window_stride: int = field(default=1, metadata={"help": "With 'sliding': steps per move."})
    train_timestep_fraction: float = field(
        default=1.0, metadata={"help": "Share of the stochastic steps that are trained, drawn anew per generation."}
    )

    def _fill_defaults(self) -> None:
        super()._fill_defaults()
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        check_int(self, "num_inference_steps", 2)
        if self.sde_window_range is None:
            last = self.num_inference_steps - 1 if self.sde_type == "ddim" else self.num_inference_steps // 2
            self.sde_window_range = [0, max(1, last)]
        if self.sde_window_size is None:
            self.sde_window_size = self.sde_window_range[1] - self.sde_window_range[0]

    def _check_numbers(self) -> None:
        super()._check_numbers()
        check_int(self, "num_generations", self._least_group)
        for name in ("sde_window_size", "sde_window_interval", "sde_window_stride"):
            check_int(self, name, 1)
        for name, high in (("epsilon", 1.0), ("epsilon_high", math.inf), ("advantage_clip", math.inf)):
            check_real(self, name, 0.0, high)
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0: nothing would be trained")
        check_real(self, "beta", 0.0, math.inf)
        check_real(self, "credit_discount", 0.0, 1.0)
        check_real(self, "train_timestep_fraction", 0.0, 1.0)
        if self.train_timestep_fraction == 0:
            raise ValueError(
                "train_timestep_fraction must be above 0: it is the share of stochastic steps that is trained"
            )
        check_real(self, "eta", 0.0, math.inf)
        check_choice("sde_type", self.sde_type, get_args(SDEType))
        check_choice("credit", self.credit, get_args(CreditAssignment))
        check_choice("sde_window_schedule", self.sde_window_schedule, get_args(WindowSchedule))
        get_objective(self.loss_type)
        check_objective_fits(self.loss_type, self.sde_type)
        check_kl_kind(self.kl_kind)
        self._check_sampler()
        if self.loss_type == "policy_gradient" and self.optimizer_steps_per_generation > 1:
            raise ValueError(
                "loss_type 'policy_gradient' has no importance ratio, so it needs on-policy data, but these settings make "
                f"{self.optimizer_steps_per_generation:g} optimizer steps per generation; raise "
                "gradient_accumulation_steps to steps_per_generation, with num_iterations 1"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss evaluates the model as it was before training."""
        return self.beta > 0

    @property
    def trained_timesteps(self) -> int:
        """Stochastic steps of a generation that are trained."""
        assert self.sde_window_size is not None
        return len(trained_steps(self.seed, 0, range(self.sde_window_size), self.train_timestep_fraction))

    @property
    def _least_group(self) -> int:
        return 2

    def _check_sampler(self) -> None:
        check_eta(self.sde_type, self.eta)
        window = self.sde_window_range
        if not isinstance(window, (list, tuple)) or len(window) != 2 or not all(is_int(value) for value in window):
            raise ValueError(f"sde_window_range must be two integers [low, high), got {window!r}")
        assert self.sde_window_size is not None
        check_sde_window(self.num_inference_steps, self.sde_window_size, (window[0], window[1]))
        if self.sde_type in ("flow_sde", "dance_sde") and window[1] > self.num_inference_steps // 2:
            logger.warning(
                f"{self.sde_type} with a window up to step {window[1]} of {self.num_inference_steps} leaves white noise in "
                "the final latents, which the reward takes for image content. Use sde_type 'cps' or an earlier window."
            )


@dataclass
class DDPOConfig(DiffusionGRPOConfig):
    """Settings of DDPO (arXiv 2305.13301) on DDPM models: independent samples, advantages from a history per prompt."""

    num_generations: int = field(default=1, metadata={"help": "Samples per prompt in a generation batch."})
    num_inference_steps: int = field(default=50, metadata={"help": "Sampling steps of training rollouts."})
    guidance_scale: float = field(
        default=5.0, metadata={"help": "Classifier-free guidance above 1, in rollouts and in training alike."}
    )
    sde_type: SDEType = field(default="ddim", metadata={"help": "Stochastic step; 'ddim' for DDPM models."})
    eta: float = field(default=1.0, metadata={"help": "Noise strength of the sampler's stochastic steps."})
    sde_window_size: int | None = field(
        default=None, metadata={"help": "Stochastic steps per generation. None: all of sde_window_range."}
    )
    share_noise_within_group: bool = field(
        default=False, metadata={"help": "Score samples of one prompt under the same noise."}
    )
    lora_rank: int = field(default=4, metadata={"help": "Rank of the policy's LoRA."})
    lora_alpha: int = field(default=4, metadata={"help": "Alpha of the policy's LoRA."})
    per_prompt_stat_tracking: bool = field(
        default=True, metadata={"help": "Normalise rewards by a history of each prompt's own; else by the batch."}
    )
    per_prompt_stat_tracking_buffer_size: int = field(
        default=16, metadata={"help": "Rewards that are remembered per prompt."}
    )
    per_prompt_stat_tracking_min_count: int = field(
        default=16, metadata={"help": "Rewards of a prompt from which on its own statistics are used."}
    )

    @property
    def _least_group(self) -> int:
        return 1

    def _check_numbers(self) -> None:
        super()._check_numbers()
        check_int(self, "per_prompt_stat_tracking_buffer_size", 2)
        check_int(self, "per_prompt_stat_tracking_min_count", 2)
        size, least = self.per_prompt_stat_tracking_buffer_size, self.per_prompt_stat_tracking_min_count
        if least > size:
            raise ValueError(
                f"per_prompt_stat_tracking_min_count {least} exceeds the buffer of {size} rewards, so no prompt would ever "
                "use its own statistics; lower it or raise per_prompt_stat_tracking_buffer_size"
            )
