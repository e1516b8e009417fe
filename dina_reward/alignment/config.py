"""Configuration of `DiffusionGRPOTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from dina_reward.alignment.advantages import Aggregation, ScaleRewards
from dina_reward.alignment.objectives import KLKind, check_kl_kind, get_objective
from dina_reward.alignment.rollout import check_sde_window
from dina_reward.alignment.steps import SDEType, check_eta


logger = logging.get_logger(__name__)


@dataclass
class DiffusionGRPOConfig(TrainingArguments):
    """Settings of Flow-GRPO training. Names follow `trl.GRPOConfig`; everything else is `transformers.TrainingArguments`.

    `per_device_train_batch_size` counts samples of a micro-batch. A generation batch has
    ``per_device_train_batch_size x processes x steps_per_generation`` samples, in groups of `num_generations`, and makes
    ``steps_per_generation x num_iterations / gradient_accumulation_steps`` optimizer steps.
    """

    output_dir: str = field(
        default="trainer_output", metadata={"help": "Directory of checkpoints, pictures and the evaluation history."}
    )
    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate of the optimizer."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay."})
    logging_steps: float = field(default=1, metadata={"help": "Optimizer steps between two log lines."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept false: dataset columns are handed to the reward functions."}
    )

    num_generations: int = field(default=8, metadata={"help": "Samples per prompt: the size of a group, at least 2."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches made out of one generation batch. Default: gradient_accumulation_steps."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over a generation batch (mu of GRPO)."})

    loss_type: str = field(default="ppo_clip", metadata={"help": "Objective: 'ppo_clip' or 'policy_gradient'."})
    epsilon: float = field(
        default=1e-4,
        metadata={"help": "Clip range of the ratio. Log-probs are means over latent elements, so it is tiny."},
    )
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range. Default: epsilon."})
    advantage_clip: float = field(default=5.0, metadata={"help": "Advantages are clamped to +- this value."})
    beta: float = field(
        default=0.0, metadata={"help": "Weight of the KL to the model without LoRA. 0 skips the reference forward."}
    )
    kl_kind: KLKind = field(
        default="flow_grpo",
        metadata={"help": "Definition of the KL that beta multiplies: 'step', 'flow_grpo' or 'velocity'."},
    )
    scale_rewards: ScaleRewards = field(
        default="group", metadata={"help": "Divide advantages by the std of the 'group', of the 'batch', or 'none'."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function. Default: all 1."}
    )
    multi_objective_aggregation: Aggregation = field(
        default="sum_then_normalize",
        metadata={"help": "'sum_then_normalize' or 'normalize_then_sum' (GDPO) when there are several rewards."},
    )

    num_inference_steps: int = field(default=10, metadata={"help": "Sampling steps of training rollouts."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Classifier-free guidance above 1, in rollouts and in training alike."}
    )
    sde_type: SDEType = field(
        default="cps",
        metadata={"help": "Stochastic step: 'cps', 'flow_sde' or 'dance_sde'. CPS leaves no noise behind."},
    )
    eta: float = field(
        default=0.8,
        metadata={"help": "Noise strength of the sampler's stochastic steps (not the reward's noise level)."},
    )
    sde_window_size: int | None = field(
        default=3,
        metadata={"help": "Stochastic (and trained) steps per generation. None: all of sde_window_range."},
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "Steps [low, high) that the window is drawn from. Default: the first half, without the last."
        },
    )
    same_latent_within_group: bool = field(
        default=False, metadata={"help": "Start all members of a group from the same initial latent."}
    )
    height: int = field(default=512, metadata={"help": "Image height in pixels."})
    width: int = field(default=512, metadata={"help": "Image width in pixels."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Length that the policy's prompts are encoded to. Default: the pipeline's."}
    )

    reward_noise_level: list[float] = field(
        default_factory=lambda: [0.4],
        metadata={"help": "Noise level(s) at which a LatentReward scores, in [0, 1]. Several form an ensemble."},
    )
    reward_ensemble: Literal["tokens", "mean"] = field(
        default="tokens", metadata={"help": "How a LatentReward combines several levels: 'tokens' or 'mean'."}
    )
    reward_num_noise_samples: int = field(default=1, metadata={"help": "Noise draws per level of a LatentReward."})
    share_noise_within_group: bool = field(
        default=True, metadata={"help": "Score all members of a group under the same noise, so that it cancels."}
    )

    lora_rank: int = field(default=32, metadata={"help": "Rank of the policy's LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Alpha of the policy's LoRA, usually twice the rank."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Suffixes of the layers to adapt. Default: the family's attention projections."},
    )
    ema_decay: float | None = field(
        default=0.9, metadata={"help": "Decay of the moving average used in evaluation and saved beside the policy."}
    )
    ema_update_every: int = field(default=8, metadata={"help": "Optimizer steps between updates of the average."})

    eval_num_inference_steps: int = field(
        default=40, metadata={"help": "ODE sampling steps of the held-out evaluation."}
    )
    eval_num_images: int = field(
        default=16, metadata={"help": "Images in the picture that each evaluation writes; 0 for none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fill_defaults()
        self._check_numbers()
        self._check_geometry()
        self._check_sampler()
        self._check_reward()
        self._check_trainer_options()

    def _fill_defaults(self) -> None:
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        if isinstance(self.reward_noise_level, (int, float)):
            self.reward_noise_level = [float(self.reward_noise_level)]
        _check_int(self, "num_inference_steps", 2)
        if self.sde_window_range is None:
            self.sde_window_range = [0, max(1, self.num_inference_steps // 2)]
        if self.sde_window_size is None:
            self.sde_window_size = self.sde_window_range[1] - self.sde_window_range[0]

    def _check_numbers(self) -> None:
        """TrlParser stores YAML values as they are, so types are checked here too."""
        for name, least in _INTEGERS.items():
            _check_int(self, name, least)
        for name, low, high in _REALS:
            _check_real(self, name, low, high)
        if self.ema_decay is not None:
            _check_real(self, "ema_decay", 0, 1)
            if self.ema_decay in (0, 1):
                raise ValueError(
                    f"ema_decay must lie strictly between 0 and 1 (None for no EMA), got {self.ema_decay}"
                )
        if self.max_sequence_length is not None:
            _check_int(self, "max_sequence_length", 1)
        get_objective(self.loss_type)
        check_kl_kind(self.kl_kind)
        _check_choice("scale_rewards", self.scale_rewards, get_args(ScaleRewards))
        _check_choice("multi_objective_aggregation", self.multi_objective_aggregation, get_args(Aggregation))
        if self.loss_type == "policy_gradient" and self.optimizer_steps_per_generation > 1:
            raise ValueError(
                "loss_type 'policy_gradient' has no importance ratio, so it needs on-policy data, but these settings make "
                f"{self.optimizer_steps_per_generation:g} optimizer steps per generation; raise "
                "gradient_accumulation_steps to steps_per_generation, with num_iterations 1"
            )

    @property
    def optimizer_steps_per_generation(self) -> float:
        """Optimizer steps between two generations; below 1 when one step accumulates several generations."""
        return self.micro_steps_per_generation / self.gradient_accumulation_steps

    @property
    def micro_steps_per_generation(self) -> int:
        """Micro-steps between two generations."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation * self.num_iterations

    def _check_geometry(self) -> None:
        micro, accumulation = self.micro_steps_per_generation, self.gradient_accumulation_steps
        if micro % accumulation and accumulation % micro:
            raise ValueError(
                f"steps_per_generation x num_iterations = {micro} and gradient_accumulation_steps = {accumulation}: "
                "one must be a multiple of the other, otherwise an optimizer step ends inside a generation batch"
            )
        saving = {SaveStrategy.STEPS: "save_steps", SaveStrategy.BEST: "eval_steps"}.get(
            SaveStrategy(self.save_strategy)
        )
        for name in filter(None, ("max_steps", saving)):
            value = getattr(self, name)
            if value and value > 0 and (value != int(value) or int(value) * accumulation % micro):
                raise ValueError(
                    f"{name} is {value}, but a generation batch spans {micro // accumulation} optimizer steps and a run can "
                    f"only resume where one begins; make {name} a multiple of {micro // accumulation}"
                )

    def _check_sampler(self) -> None:
        check_eta(self.sde_type, self.eta)
        window = self.sde_window_range
        if not isinstance(window, (list, tuple)) or len(window) != 2 or not all(_is_int(value) for value in window):
            raise ValueError(f"sde_window_range must be two integers [low, high), got {window!r}")
        assert self.sde_window_size is not None
        check_sde_window(self.num_inference_steps, self.sde_window_size, (window[0], window[1]))
        if self.sde_type != "cps" and window[1] > self.num_inference_steps // 2:
            logger.warning(
                f"{self.sde_type} with a window up to step {window[1]} of {self.num_inference_steps} leaves white noise in "
                "the final latents, which the reward takes for image content. Use sde_type 'cps' or an earlier window."
            )

    def _check_reward(self) -> None:
        levels = self.reward_noise_level
        if not levels or not all(_is_real(level) and 0 <= level <= 1 for level in levels):
            raise ValueError(f"reward_noise_level must be one or more levels in [0, 1], got {levels!r}")
        _check_choice("reward_ensemble", self.reward_ensemble, ("tokens", "mean"))
        weights = self.reward_weights
        if weights is not None and not (isinstance(weights, list) and all(_is_real(weight) for weight in weights)):
            raise ValueError(f"reward_weights must be a list of numbers, one per reward function, got {weights!r}")

    def _check_trainer_options(self) -> None:
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay false: reward functions read the dataset's columns")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would change the groups while training; set the batch size yourself"
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end is not supported; load the LoRA of the checkpoint you want instead"
            )
        sharding: Any = self.accelerator_config
        if sharding.split_batches or sharding.dispatch_batches:
            raise ValueError(
                "accelerator_config split_batches and dispatch_batches must be off: every rank reads its own rows"
            )


_INTEGERS = {
    "num_generations": 2,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_num_inference_steps": 1,
    "eval_num_images": 0,
    "height": 1,
    "width": 1,
    "reward_num_noise_samples": 1,
    "lora_rank": 1,
    "lora_alpha": 1,
    "ema_update_every": 1,
    "sde_window_size": 1,
    "seed": 0,
}
_REALS = (
    ("epsilon", 0.0, 1.0),
    ("epsilon_high", 0.0, math.inf),
    ("advantage_clip", 0.0, math.inf),
    ("beta", 0.0, math.inf),
    ("guidance_scale", 0.0, math.inf),
    ("eta", 0.0, math.inf),
)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_int(config: object, name: str, least: int) -> None:
    value = getattr(config, name)
    if not _is_int(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_real(config: object, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not _is_real(value) or not low <= value <= high:
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], got {value!r}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
