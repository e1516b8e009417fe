"""Configuration of `LatentRewardTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from dina_reward.checks.values import check_fields, check_trainer_numbers, is_real
from dina_reward.likelihood import PreferenceLoss
from dina_reward.noise import LevelSampler
from dina_reward.quiet import use_new_names


@dataclass
class LatentRewardTrainingConfig(TrainingArguments):
    """Arguments of `LatentRewardTrainer`: those of `transformers.TrainingArguments` and the ones below.

    The defaults are the published recipe (arXiv 2602.11146). Variance parameters of the likelihood belong to the reward
    (`LatentRewardConfig.variance_scale`, ``variance_offset``), because its users need them as well. ``bf16=True`` computes
    in bfloat16 by autocast while LoRA, head and optimizer stay float32; ``optim="adamw_bnb_8bit"`` keeps the optimizer
    state in 8 bits.

    Examples:
        >>> args = LatentRewardTrainingConfig(output_dir="reward", level_distribution="logit_normal", ema_decay=0.999)
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "Initial learning rate of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the preference dataset."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Pairs per device and forward pass."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator reads columns that the model never sees."}
    )
    loss_type: str = field(
        default="thurstone_fidelity",
        metadata={
            "help": "Preference loss: 'thurstone_fidelity' (published), 'thurstone_nll' or 'bradley_terry', or 'gaussian', "
            "which regresses on a judge's scores; it has to fit the reward's likelihood. "
            "The Thurstone variance is the reward's own, k sigma^2 + c; a fixed variance is k = 0."
        },
    )
    margin: float = field(default=0.0, metadata={"help": "Margin of the loss 'bradley_terry'."})
    freeze_backbone: bool = field(
        default=False,
        metadata={"help": "Train the head alone; the LoRA stays at its start, where it changes nothing."},
    )
    share_noise_within_pair: bool = field(
        default=True,
        metadata={"help": "Both sides of a pair see the same noise, which then cancels; false: each has its own."},
    )
    level_distribution: str = field(
        default="uniform",
        metadata={
            "help": "Distribution of the training noise level in [0, 1]: 'uniform', 'logit_normal', 'mode', 'constant', "
            "'power' or 'beta'."
        },
    )
    level_mean: float = field(default=0.0, metadata={"help": "Mean of the logit under 'logit_normal'."})
    level_std: float = field(default=1.0, metadata={"help": "Standard deviation of the logit under 'logit_normal'."})
    level_mode_scale: float = field(default=1.29, metadata={"help": "Scale s of 'mode' (arXiv 2403.03206)."})
    level_value: float = field(default=0.4, metadata={"help": "The level of 'constant'."})
    level_exponent: float = field(default=2.0, metadata={"help": "Exponent p of 'power': u ** p."})
    level_alpha: float = field(default=2.0, metadata={"help": "First shape parameter of 'beta'."})
    level_beta: float = field(default=2.0, metadata={"help": "Second shape parameter of 'beta'."})
    eval_noise_levels: list[float] = field(
        default_factory=lambda: [0.3, 0.4, 0.5],
        metadata={"help": "Noise levels at which pairwise accuracy is evaluated, one by one."},
    )
    eval_ensemble_levels: list[float] | None = field(
        default_factory=lambda: [0.2, 0.5, 0.7],
        metadata={"help": "Noise levels of the ensemble that is evaluated too; null for none."},
    )
    eval_seed: int = field(
        default=0, metadata={"help": "Seed of the evaluation noise, which is the same at every evaluation."}
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of the moving average of the weights, which evaluation and the final save then use; null for "
            "none."
        },
    )
    ema_update_every: int = field(default=1, metadata={"help": "Optimizer steps between two updates of the average."})

    def __post_init__(self) -> None:
        use_new_names(self)
        super().__post_init__()
        # Without an accelerator torch warns about it and does nothing.
        self.dataloader_pin_memory &= torch.accelerator.is_available()
        check_trainer_numbers(self)
        check_fields(self, beside=TrainingArguments)
        self.level_sampler()
        PreferenceLoss(self.loss_type, margin=self.margin)  # type: ignore[arg-type]
        self._check_evaluation()
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay must lie strictly between 0 and 1, got {self.ema_decay}; null switches EMA off"
            )
        if self.ema_update_every < 1:
            raise ValueError(f"ema_update_every must be at least 1, got {self.ema_update_every}")
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns must be false: it would drop the columns prompt, chosen and rejected"
            )

    def _check_evaluation(self) -> None:
        if not self.eval_noise_levels:
            raise ValueError("eval_noise_levels is empty; name at least one level, e.g. [0.4]")
        if self.eval_ensemble_levels is not None and len(self.eval_ensemble_levels) < 2:
            raise ValueError(
                f"eval_ensemble_levels={self.eval_ensemble_levels} is no ensemble; name two levels or more, or null"
            )
        for name in ("eval_noise_levels", "eval_ensemble_levels"):
            levels: list[Any] = getattr(self, name) or []
            if not all(is_real(level) and 0 <= level <= 1 for level in levels):
                raise ValueError(f"{name} must be noise levels in [0, 1], got {levels}")

    def level_sampler(self) -> LevelSampler:
        """The distribution of training noise levels."""
        return LevelSampler(
            self.level_distribution,  # type: ignore[arg-type]
            mean=self.level_mean,
            std=self.level_std,
            mode_scale=self.level_mode_scale,
            value=self.level_value,
            exponent=self.level_exponent,
            alpha=self.level_alpha,
            beta=self.level_beta,
        )


def check_mixed_precision(weights: torch.dtype, args: TrainingArguments) -> None:
    """Refuses autocast to another 16-bit dtype than the frozen weights are in, which their matrix products cannot mix.

    Args:
        weights: dtype of the frozen weights.
        args: whose ``bf16`` and ``fp16`` choose autocast.

    Raises:
        ValueError: naming both dtypes.
    """
    computed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    if computed is not None and weights in (torch.bfloat16, torch.float16) and weights != computed:
        name = "bf16" if args.bf16 else "fp16"
        raise ValueError(
            f"{name}=True computes in {computed}, but the frozen weights are {weights}; load the pipeline with "
            f"torch_dtype={computed} (or torch.float32), or set {name} to false"
        )
