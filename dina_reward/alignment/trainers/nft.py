"""DiffusionNFT: likelihood-free alignment on the forward process, with a soft copy of the policy that samples."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dina_reward.alignment.experience.maker import Experience
from dina_reward.alignment.objectives.policy_gradient import ObjectiveOutput
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.prompts import PromptDataset
from dina_reward.alignment.trainers.forward_process import ForwardProcess, ForwardProcessConfig, ForwardProcessTrainer
from dina_reward.checks.values import check_real
from dina_reward.noise import NoisePoint
from dina_reward.reward_functions import RewardFunction


OLD_POLICY_DIRECTORY = "old_policy"

_LEAST_ERROR = 1e-5


@dataclass
class DiffusionNFTConfig(ForwardProcessConfig):
    """Settings of DiffusionNFT (arXiv 2509.16117)."""

    nft_beta: float = field(
        default=1.0,
        metadata={
            "help": "Weight b of the trained prediction in v+ = (1 - b) v_old + b v and v- = (1 + b) v_old - b v."
        },
    )
    advantage_clip: float = field(
        default=5.0,
        metadata={"help": "Advantages of +- this value and beyond are certainly good or bad (r = 1 or 0)."},
    )
    old_policy_decay_rate: float = field(
        default=0.001,
        metadata={
            "help": "The sampling policy keeps the share min(rate * i, old_policy_decay_max) of itself after generation i "
            "= 1, 2, ... and takes the rest from the trained policy."
        },
    )
    old_policy_decay_max: float = field(
        default=0.5, metadata={"help": "Upper limit of that share. 0: samples are on-policy."}
    )
    beta_kl: float = field(
        default=0.0,
        metadata={"help": "Weight of the mean squared distance to the reference's prediction. 0 builds no reference."},
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss evaluates the model as it was before training."""
        return self.beta_kl > 0

    def _check_numbers(self) -> None:
        super()._check_numbers()
        for name in ("nft_beta", "advantage_clip"):
            check_real(self, name, 1e-6, float("inf"))
        check_real(self, "old_policy_decay_rate", 0.0, 1.0)
        check_real(self, "old_policy_decay_max", 0.0, 1.0)
        check_real(self, "beta_kl", 0.0, float("inf"))


class DiffusionNFTTrainer(ForwardProcessTrainer):
    """Negative-aware fine-tuning of a diffusion or flow-matching pipeline (DiffusionNFT, arXiv 2509.16117).

    An old policy, a soft copy of the trained one, samples groups deterministically. The samples are noised afresh, and the
    trained prediction is pulled towards good ones and, mirrored at the old prediction, pushed away from bad ones
    (`nft_loss`). There are no log-probabilities, trajectories or stochastic steps, and usually no guidance. See
    `AlignmentTrainer` for the arguments.

    Checkpoints hold the old policy in ``old_policy/``, in the format of the policy itself.

    Examples:
        >>> trainer = DiffusionNFTTrainer(pipe, reward, DiffusionNFTConfig("out"), train_dataset=["a cat", "a dog"])
        >>> trainer.train()
    """

    args: DiffusionNFTConfig

    def __init__(
        self,
        pipeline: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: DiffusionNFTConfig,
        train_dataset: PromptDataset,
        **kwargs: Any,
    ) -> None:
        super().__init__(pipeline, reward_funcs, args, train_dataset, **kwargs)
        self.old_policy = OldPolicy(self.policy, args)
        self.add_callback(self.old_policy)

    def make_experience(self, generation: int) -> tuple[list[Experience], dict[str, float]]:
        """Samples of the old policy, scored and compared."""
        with self.old_policy.weights():
            experience, metrics = super().make_experience(generation)
        return experience, {**metrics, "old_policy_decay": self.old_policy.decay}

    def step_loss(self, model: nn.Module, experience: Experience, position: int) -> ObjectiveOutput:
        """`nft_loss`, plus the KL penalty, of one micro-batch at the levels of a pass, each under noise of its own."""
        positions = self.args.joint_positions(position)
        together = len(positions)
        noise, point = self.draw(experience, positions, experience.rows)
        latents = experience.rollout.latents.to(self.accelerator.device).repeat(together, *[1] * (noise.dim() - 1))
        noisy = self.forward_process.noisy(latents, noise, point).to(self.policy.storage_dtype)
        conditioning = experience.conditioning[experience.prompt_index * together]
        weights = experience.weights.repeat(together)
        bound = self.policy.bind(conditioning, experience.negative)
        old_prediction = reference = None
        with torch.no_grad():
            if not self.old_policy.is_current:
                with self.old_policy.weights():
                    old_prediction = bound(noisy, point.timestep)
            if self.args.beta_kl > 0:
                with self.policy.reference():
                    reference = bound(noisy, point.timestep)
        prediction = self.policy.bind(conditioning, experience.negative, model)(noisy, point.timestep)
        output = nft_loss(
            self.forward_process,
            latents=latents,
            noisy=noisy,
            point=point,
            prediction=prediction,
            old_prediction=prediction if old_prediction is None else old_prediction,
            advantages=experience.advantages.repeat(together),
            weights=weights,
            nft_beta=self.args.nft_beta,
            advantage_clip=self.args.advantage_clip,
        )
        if reference is None:
            return output
        kl = (weights * _row_mean((prediction - reference) ** 2)).mean()
        return ObjectiveOutput(
            output.loss + self.args.beta_kl * self.tightness * kl, {**output.metrics, "kl": kl.detach()}
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the policy's weights, and in checkpoints those of the old policy to ``old_policy/``."""
        super().save_model(output_dir, _internal_call)
        if _internal_call:
            directory = self.args.output_dir if output_dir is None else output_dir
            with self.old_policy.weights():
                self.policy.save_weights(os.path.join(directory, OLD_POLICY_DIRECTORY), write=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_weights(os.path.join(resume_from_checkpoint, OLD_POLICY_DIRECTORY))
        self.old_policy.restore(self.policy.snapshot())
        super()._load_from_checkpoint(resume_from_checkpoint, model)


class OldPolicy(TrainerCallback):
    """The policy that samples: ``theta_old <- eta_i theta_old + (1 - eta_i) theta`` after generation ``i = 1, 2, ...``.

    ``eta_i = min(old_policy_decay_rate * i, old_policy_decay_max)``; with ``eta = 0`` it is the trained policy at the start
    of each generation. Its number of updates follows from the optimizer steps made. While it is the trained policy itself
    (`is_current`: with ``eta = 0``, until a generation's first optimizer step), losses need no prediction of its own.

    Args:
        policy (`Policy`): the trained one.
        args (`DiffusionNFTConfig`): the configuration.
    """

    def __init__(self, policy: Policy, args: DiffusionNFTConfig) -> None:
        self.policy = policy
        self.args = args
        self.decay = 0.0
        self.is_current = True
        self._tensors: list[Tensor] | None = None
        self._restored = False

    def weights(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the policy has the old weights; before training, its own."""
        return contextlib.nullcontext() if self._tensors is None else self.policy.use_weights(self._tensors)

    def restore(self, tensors: list[Tensor]) -> None:
        """Takes over the old weights of a checkpoint, a `Policy.snapshot`, for the training that begins next."""
        self._tensors, self._restored, self.is_current = tensors, True, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts as a copy of the policy, unless it has just been read from a checkpoint."""
        self.decay = self.decay_after(self._generations(state)) if state.global_step else 0.0
        self.is_current = not self._restored or self.decay == 0
        if not self._restored:
            self._tensors = self.policy.snapshot()
        self._restored = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Moves towards the trained policy when an optimizer step ends a generation."""
        self.is_current = False
        micro = self.args.micro_steps_per_generation
        if self._tensors is None or state.global_step * self.args.gradient_accumulation_steps % micro:
            return
        self.decay = self.decay_after(self._generations(state))
        with torch.no_grad():
            for old, new in zip(self._tensors, self.policy.snapshot(), strict=True):
                old.lerp_(new, 1 - self.decay)
        self.is_current = self.decay == 0

    def decay_after(self, generation: int) -> float:
        """``eta_i``, the share that is kept after the ``generation``-th generation, counted from 1."""
        return min(self.args.old_policy_decay_rate * generation, self.args.old_policy_decay_max)

    def _generations(self, state: TrainerState) -> int:
        return state.global_step * self.args.gradient_accumulation_steps // self.args.micro_steps_per_generation


def nft_loss(
    process: ForwardProcess,
    *,
    latents: Tensor,
    noisy: Tensor,
    point: NoisePoint,
    prediction: Tensor,
    old_prediction: Tensor,
    advantages: Tensor,
    weights: Tensor,
    nft_beta: float,
    advantage_clip: float = 5.0,
) -> ObjectiveOutput:
    """``mean_i weight_i [r e(v+) + (1 - r) e(v-)] / b`` (DiffusionNFT, arXiv 2509.16117).

    With ``r = clip(A, -c, c) / (2 c) + 1/2``, ``v+ = (1 - b) v_old + b v``, ``v- = (1 + b) v_old - b v`` and
    ``e(v) = mean (x_0 hat(v) - x_0)^2 / w``, where ``w = mean |x_0 hat(v) - x_0|`` carries no gradient and evens out the
    levels. On-policy (``v = v_old``) its gradient is that of ``(2 r - 1) e(v)``, whatever ``b``.

    Args:
        process (`ForwardProcess`): of the model.
        latents (`Tensor`): clean samples ``x_0``, shape ``(batch, ...)``.
        noisy (`Tensor`): the model's input, same shape.
        point (`NoisePoint`): its levels.
        prediction, old_prediction (`Tensor`): outputs of the trained and of the old policy, same shape.
        advantages, weights (`Tensor`): shape ``(batch,)``.
        nft_beta (`float`): ``b``.
        advantage_clip (`float`): ``c``.
    """
    optimality = advantages.clamp(-advantage_clip, advantage_clip) / (2 * advantage_clip) + 0.5
    old_prediction = old_prediction.detach()
    step = nft_beta * (prediction - old_prediction)
    positive, negative = (
        _relative_error(process.predict_clean(noisy, output, point), latents.float())
        for output in (old_prediction + step, old_prediction - step)
    )
    losses = (optimality * positive + (1 - optimality) * negative) / nft_beta
    return ObjectiveOutput(
        (weights * losses).mean(),
        {
            "nft/positive_error": positive.detach().mean(),
            "nft/negative_error": negative.detach().mean(),
            "nft/old_policy_distance": ((prediction.detach() - old_prediction) ** 2).mean(),
        },
    )


def _relative_error(clean: Tensor, latents: Tensor) -> Tensor:
    scale = _row_mean((clean.detach() - latents).abs()).clamp(min=_LEAST_ERROR)
    return _row_mean((clean - latents) ** 2) / scale


def _row_mean(values: Tensor) -> Tensor:
    return values.flatten(start_dim=1).mean(dim=1)
