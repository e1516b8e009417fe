"""Settings that all alignment trainers share."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from dina_reward.alignment.objectives.advantages import Aggregation, ScaleRewards
from dina_reward.alignment.sampling.prompts import BatchGeometry
from dina_reward.checks.values import check_choice, check_fields, check_int, check_real, check_trainer_numbers, is_real
from dina_reward.quiet import use_new_names


@dataclass
class AlignmentConfig(TrainingArguments):
    """Settings of every alignment trainer. Names follow `trl.GRPOConfig`; the rest is `transformers.TrainingArguments`.

    `per_device_train_batch_size` counts samples of a micro-batch. A generation batch has
    ``per_device_train_batch_size x processes x steps_per_generation`` samples, in groups of `num_generations`, and makes
    ``steps_per_generation x num_iterations / gradient_accumulation_steps`` optimizer steps.
    """

    samples_ahead: ClassVar[bool] = True
    """Whether generations are sampled as wholes, which `merge_for_rollout` and `rollout_batch_size` speed up."""

    trains_on_rows: ClassVar[bool] = True
    """Whether each sample has a loss of its own, so that `keep_per_group` can leave some out."""

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

    num_generations: int = field(default=8, metadata={"help": "Samples per prompt: the size of a group."})
    steps_per_generation: int | None = field(
        default=None,
        metadata={"help": "Micro-batches made out of one generation batch. Default: gradient_accumulation_steps."},
    )
    num_iterations: int = field(default=1, metadata={"help": "Passes over a generation batch (mu of GRPO)."})

    num_inference_steps: int = field(default=10, metadata={"help": "Sampling steps of training rollouts."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Classifier-free guidance above 1, in rollouts and in training alike."}
    )
    same_latent_within_group: bool = field(
        default=False, metadata={"help": "Start all members of a group from the same initial latent."}
    )
    height: int = field(default=512, metadata={"help": "Image height in pixels."})
    width: int = field(default=512, metadata={"help": "Image width in pixels."})
    num_frames: int = field(default=1, metadata={"help": "Frames of a video; 1 for generators of images."})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "Length that the policy's prompts are encoded to. Default: the pipeline's."}
    )

    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function. Default: all 1."}
    )
    scale_rewards: ScaleRewards = field(
        default="group", metadata={"help": "Divide advantages by the std of the 'group', of the 'batch', or 'none'."}
    )
    multi_objective_aggregation: Aggregation = field(
        default="sum_then_normalize",
        metadata={"help": "'sum_then_normalize' or 'normalize_then_sum' (GDPO) when there are several rewards."},
    )
    filter_zero_std_groups: bool = field(
        default=False,
        metadata={
            "help": "Leave groups whose members all have the same reward out of the loss (they are counted anyway)."
        },
    )
    keep_per_group: int | None = field(
        default=None,
        metadata={
            "help": "Train on so many samples of a group, half of them the best and half the worst, whose advantages remain "
            "those within the whole group. An even number; default: all. As what is left is replayed in smaller "
            "batches, ratios start at 1 up to rounding."
        },
    )
    reward_noise_level: list[float] = field(
        default_factory=lambda: [0.4],
        metadata={"help": "Noise level(s) at which a LatentReward scores, in [0, 1]. Several form an ensemble."},
    )
    reward_ensemble: Literal["tokens", "mean"] = field(
        default="tokens", metadata={"help": "How a LatentReward combines several levels: 'tokens' or 'mean'."}
    )
    reward_num_noise_samples: int = field(default=1, metadata={"help": "Noise draws per level of a LatentReward."})
    reward_kappa: float = field(
        default=0.0,
        metadata={
            "help": "Conservative scoring of a LatentReward: its score minus so many times its spread; 0 for none."
        },
    )
    reward_spread: Literal["draws", "levels", "heads"] | None = field(
        default=None,
        metadata={"help": "Spread over noise 'draws', over 'levels' or over 'heads'. Default: what there is."},
    )
    share_noise_within_group: bool = field(
        default=True, metadata={"help": "Score all members of a group under the same noise, so that it cancels."}
    )

    max_denoiser_calls: int | None = field(
        default=None,
        metadata={
            "help": "Stop at the first end of a generation at which so many denoiser calls were made: samples x evaluations "
            "of the denoiser in rollouts and updates, two under guidance. max_steps holds beside it."
        },
    )
    eval_denoiser_calls: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate whenever so many further denoiser calls were made, at the end of the generation, and when the "
            "budget is spent, besides what eval_strategy says."
        },
    )

    lora_rank: int = field(default=32, metadata={"help": "Rank of the policy's LoRA."})
    lora_alpha: int = field(default=64, metadata={"help": "Alpha of the policy's LoRA, usually twice the rank."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Suffixes of the layers to adapt. Default: the family's attention projections."},
    )
    train_full_model: bool = field(
        default=False, metadata={"help": "Train all weights of the denoiser (in float32) instead of a LoRA."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the frozen weights to NF4 under the LoRA (QLoRA, bitsandbytes)."}
    )
    merge_for_rollout: bool = field(
        default=False,
        metadata={
            "help": "Sample with the LoRA merged into the weights, which are restored bit for bit afterwards. Faster; log-"
            "probabilities are then replayed by the unmerged model, and ratios start at 1 up to rounding."
        },
    )
    rollout_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples that a process draws at once, a multiple of per_device_train_batch_size: forward passes need "
            "less memory than updates. Equal up to rounding, as first ratios then are to 1. Default: one micro-batch."
        },
    )
    reward_overlap: bool = field(
        default=False,
        metadata={
            "help": "Score a micro-batch in a thread while the next is sampled; for rewards on servers. Results are equal."
        },
    )
    offload_trajectories: bool = field(
        default=False, metadata={"help": "Keep recorded sampler states in host memory until they are trained on."}
    )
    ema_decay: float | None = field(
        default=0.9, metadata={"help": "Decay of the moving average used in evaluation and saved beside the policy."}
    )
    ema_update_every: int = field(default=8, metadata={"help": "Optimizer steps between updates of the average."})

    eval_num_inference_steps: int = field(
        default=40, metadata={"help": "Deterministic sampling steps of the held-out evaluation."}
    )
    eval_guidance_scale: float | None = field(
        default=None, metadata={"help": "Guidance of the held-out evaluation. Default: guidance_scale."}
    )
    eval_height: int | None = field(
        default=None, metadata={"help": "Image height of the held-out evaluation. Default: height."}
    )
    eval_width: int | None = field(
        default=None, metadata={"help": "Image width of the held-out evaluation. Default: width."}
    )
    eval_num_images: int = field(
        default=16, metadata={"help": "Images in the picture that each evaluation writes; 0 for none."}
    )
    hacking_window: int = field(
        default=3, metadata={"help": "Evaluations that the reward-hacking alarm looks back on."}
    )
    hacking_stop: bool = field(
        default=False, metadata={"help": "Stop the run when the reward-hacking alarm goes off."}
    )
    hacking_tighten: float = field(
        default=1.0,
        metadata={
            "help": "Factor by which each alarm raises KL weights and lowers clip ranges, and two evaluations without one "
            "undo that; see TightenOnAlarm. 1: alarms change nothing."
        },
    )

    def __post_init__(self) -> None:
        use_new_names(self)
        super().__post_init__()
        if is_real(self.reward_noise_level):
            self.reward_noise_level = [float(self.reward_noise_level)]  # type: ignore[arg-type]
        self._fill_defaults()
        self._check_numbers()
        self._check_reward()
        check_fields(self, beside=TrainingArguments)
        # Every value is of its kind now; what follows puts them together.
        self._check_geometry()
        self._check_trainer_options()

    def _fill_defaults(self) -> None:
        # Without an accelerator torch warns about it and does nothing.
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        self.eval_guidance_scale = (
            self.guidance_scale if self.eval_guidance_scale is None else self.eval_guidance_scale
        )
        self.eval_height = self.height if self.eval_height is None else self.eval_height
        self.eval_width = self.width if self.eval_width is None else self.eval_width

    def _check_numbers(self) -> None:
        """TrlParser stores YAML values as they are, so types are checked here too."""
        for name, least in _INTEGERS.items():
            check_int(self, name, least)
        check_trainer_numbers(self)
        for name, low, high in _REALS:
            check_real(self, name, low, high)
        for name in _BOUNDED:
            if getattr(self, name) > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST}, got {getattr(self, name)}")
        if self.ema_decay is not None:
            check_real(self, "ema_decay", 0, 1)
            if self.ema_decay in (0, 1):
                raise ValueError(
                    f"ema_decay must lie strictly between 0 and 1 (None for no EMA), got {self.ema_decay}"
                )
        for name in ("max_sequence_length", "max_denoiser_calls", "eval_denoiser_calls", "rollout_batch_size"):
            if getattr(self, name) is not None:
                check_int(self, name, 1)
        if self.max_sequence_length is not None and self.max_sequence_length > 32_768:
            raise ValueError(f"max_sequence_length must be at most 32768 tokens, got {self.max_sequence_length}")
        targets = self.lora_target_modules
        if targets is not None and not (
            isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)
        ):
            raise ValueError(f"lora_target_modules must be a list of names of layers, or null, got {targets!r}")
        self._check_selection()
        check_choice("scale_rewards", self.scale_rewards, get_args(ScaleRewards))
        check_choice("multi_objective_aggregation", self.multi_objective_aggregation, get_args(Aggregation))

    def _check_selection(self) -> None:
        if self.keep_per_group is None:
            return
        check_int(self, "keep_per_group", 2)
        if self.keep_per_group % 2 or self.keep_per_group > self.num_generations:
            raise ValueError(
                f"keep_per_group must be an even number of at most num_generations={self.num_generations} (half of it best, "
                f"half worst), got {self.keep_per_group}; or None to train on all"
            )
        if not self.trains_on_rows:
            raise ValueError(
                f"keep_per_group does nothing under {type(self).__name__}, whose loss is not one of single samples; drop it"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss evaluates the model as it was before training."""
        return False

    @property
    def optimizer_steps_per_generation(self) -> float:
        """Optimizer steps between two generations; below 1 when one step accumulates several generations."""
        return self.micro_steps_per_generation / self.gradient_accumulation_steps

    @property
    def micro_steps_per_generation(self) -> int:
        """Micro-steps between two generations."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation * self.num_iterations

    def geometry(self, num_processes: int | None = None) -> BatchGeometry:
        """How the rows of a generation batch are split.

        Args:
            num_processes: ranks; by default those that the launcher announces in ``WORLD_SIZE``.

        Raises:
            ValueError: groups would not be whole; the message names the nearest numbers that fit.
        """
        assert self.steps_per_generation is not None
        return BatchGeometry(
            batch_size=self.per_device_train_batch_size,
            num_processes=int(os.environ.get("WORLD_SIZE", "1")) if num_processes is None else num_processes,
            num_chunks=self.steps_per_generation,
            num_generations=self.num_generations,
            num_iterations=self.num_iterations,
        )

    def micro_batches_per_rollout(self) -> int:
        """Micro-batches that are sampled at once."""
        rows = self.rollout_batch_size
        return 1 if rows is None else min(rows // self.per_device_train_batch_size, self.geometry().num_chunks)

    def _check_geometry(self) -> None:
        self.geometry()
        if self.rollout_batch_size is not None and self.rollout_batch_size % self.per_device_train_batch_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is not a multiple of per_device_train_batch_size="
                f"{self.per_device_train_batch_size}; whole micro-batches are sampled at once"
            )
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

    def _check_reward(self) -> None:
        levels = self.reward_noise_level
        if (
            not isinstance(levels, (list, tuple))
            or not levels
            or not all(is_real(level) and 0 <= level <= 1 for level in levels)
        ):
            raise ValueError(f"reward_noise_level must be one or more levels in [0, 1], got {levels!r}")
        check_choice("reward_ensemble", self.reward_ensemble, ("tokens", "mean"))
        check_real(self, "reward_kappa", 0.0, 1000.0)
        if self.reward_spread is not None:
            check_choice("reward_spread", self.reward_spread, ("draws", "levels", "heads"))
        weights = self.reward_weights
        if weights is not None and not (isinstance(weights, list) and all(is_real(weight) for weight in weights)):
            raise ValueError(f"reward_weights must be a list of numbers, one per reward function, got {weights!r}")

    def _check_trainer_options(self) -> None:
        if self.train_full_model and self.load_in_4bit:
            raise ValueError(
                "train_full_model and load_in_4bit exclude each other: quantised weights cannot be trained"
            )
        for name in ("merge_for_rollout", "rollout_batch_size"):
            if getattr(self, name) and not self.samples_ahead:
                raise ValueError(
                    f"{name} does nothing under {type(self).__name__}, which samples its own way; drop it"
                )
        if self.merge_for_rollout and (self.train_full_model or self.load_in_4bit):
            other = "train_full_model" if self.train_full_model else "load_in_4bit"
            raise ValueError(
                f"merge_for_rollout adds a LoRA to weights in 16 or 32 bits, and {other} has none of either; drop one"
            )
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


_LARGEST = 16_384
_BOUNDED = (
    "height", "width", "eval_height", "eval_width", "num_frames", "lora_rank", "num_inference_steps",
    "eval_num_inference_steps",
)  # fmt: skip
_INTEGERS = {
    "num_inference_steps": 2,
    "num_generations": 1,
    "steps_per_generation": 1,
    "num_iterations": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_num_inference_steps": 1,
    "eval_num_images": 0,
    "eval_height": 1,
    "eval_width": 1,
    "hacking_window": 1,
    "height": 1,
    "num_frames": 1,
    "width": 1,
    "reward_num_noise_samples": 1,
    "lora_rank": 1,
    "lora_alpha": 1,
    "ema_update_every": 1,
    "seed": 0,
}
_REALS = (
    ("guidance_scale", 0.0, math.inf),
    ("eval_guidance_scale", 0.0, math.inf),
    ("hacking_tighten", 1.0, 16.0),
)
