"""Policy-gradient trainers: group-relative (Flow-GRPO and its kin, GRPO on DDPM models) and DDPO."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dina_reward.alignment.experience.maker import Experience, RolloutPlan
from dina_reward.alignment.objectives.advantages import Advantages, PerPromptStatTracker
from dina_reward.alignment.objectives.policy_gradient import (
    ObjectiveOutput,
    ObjectiveSettings,
    get_objective,
    mean_output,
    step_kl,
)
from dina_reward.alignment.sampling.prompts import PromptDataset
from dina_reward.alignment.sampling.rollout import sde_window, trained_steps
from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.alignment.trainers.base import AlignmentTrainer
from dina_reward.alignment.trainers.grpo_config import DDPOConfig, DiffusionGRPOConfig
from dina_reward.checks.stored import read_json
from dina_reward.reward_functions import RewardFunction
from dina_reward.training.checkpointing import CheckpointedCallback


class DiffusionGRPOTrainer(AlignmentTrainer):
    """Group-relative policy optimisation of a diffusion or flow-matching pipeline (Flow-GRPO, arXiv 2505.05470).

    Each generation samples groups of latents that share a prompt, with stochastic steps inside a window, scores the final
    latents and trains on the recorded steps. By configuration: Flow-SDE, Dance-SDE, CPS, or DDIM on DDPM models; random,
    fixed or sliding windows; subsets of steps; guidance; clip-higher; GRPO-Guard; KL to the model without LoRA; step-wise
    credit from rewards of the predicted clean latents. See `AlignmentTrainer` for the arguments.

    Examples:
        >>> trainer = DiffusionGRPOTrainer(pipe, reward, DiffusionGRPOConfig("out"), train_dataset=["a cat", "a dog"])
        >>> trainer.train()
    """

    args: DiffusionGRPOConfig

    def __init__(
        self,
        pipeline: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: DiffusionGRPOConfig,
        train_dataset: PromptDataset,
        **kwargs: Any,
    ) -> None:
        super().__init__(pipeline, reward_funcs, args, train_dataset, **kwargs)
        self._objective = get_objective(args.loss_type)

    @property
    def can_tighten(self) -> bool:
        """Always where ratios are clipped; otherwise with a KL penalty."""
        return super().can_tighten or self.args.loss_type != "policy_gradient"

    def _settings(self) -> ObjectiveSettings:
        args = self.args
        assert args.epsilon_high is not None
        return ObjectiveSettings(
            args.epsilon / self.tightness, args.epsilon_high / self.tightness, args.advantage_clip
        )

    def _new_sampler(self) -> Sampler:
        args = self.args
        shape = self.policy.latent_shape(args.height, args.width, args.num_frames)
        return self.policy.sampler(
            args.num_inference_steps, shape, sde_type=args.sde_type, eta=args.eta, device=self.accelerator.device
        )

    def plan(self, generation: int) -> RolloutPlan:
        """The stochastic steps of a generation, those that are trained, and what is recorded of them."""
        args = self.args
        assert args.sde_window_size is not None
        assert args.sde_window_range is not None
        low, high = args.sde_window_range
        window = sde_window(
            args.seed,
            generation,
            args.sde_window_size,
            (low, high),
            args.sde_window_schedule,
            args.sde_window_interval,
            args.sde_window_stride,
        )
        return RolloutPlan(
            stochastic=window,
            trained=trained_steps(args.seed, generation, window, args.train_timestep_fraction),
            keep_means="mean_shift" in self._objective.requires,
            reference=args.beta > 0,
            credit_discount=args.credit_discount if args.credit == "gain" else None,
        )

    def num_losses(self, experience: Experience) -> int:
        """One loss for the recorded steps that share a pass."""
        return len(experience.rollout.trained) // self.args.joint_timesteps()

    def step_loss(self, model: nn.Module, experience: Experience, position: int) -> ObjectiveOutput:
        """Objective, plus KL penalty, of one micro-batch at the recorded steps of a pass: the mean over them."""
        rollout, device, rows = experience.rollout, self.accelerator.device, len(experience.rows)
        steps = [rollout.trained[number] for number in self.args.joint_positions(position)]
        latents = [rollout.states[index].to(device) for index in steps]
        conditioning = experience.conditioning[experience.prompt_index * len(steps)]
        predict = self.policy.bind(conditioning, experience.negative, model)
        timesteps = torch.cat([self.sampler.timesteps[index].expand(rows) for index in steps])
        predictions = predict(torch.cat(latents), timesteps).split(rows)
        return mean_output(
            [self._loss_at(experience, *each) for each in zip(steps, latents, predictions, strict=True)]
        )

    def _loss_at(self, experience: Experience, index: int, latents: Tensor, prediction: Tensor) -> ObjectiveOutput:
        rollout, device = experience.rollout, self.accelerator.device
        next_latents = rollout.states[index + 1].to(device)
        step = self.sampler.replay_step(index, latents, prediction, next_latents=next_latents)
        tensors = {
            "log_prob": step.log_prob,
            "old_log_prob": rollout.log_probs[index],
            "advantages": experience.advantages_at(index),
            "weights": experience.weights,
            "std": step.transition.std,
            "delta": step.transition.delta,
        }
        if index in rollout.means:
            shift = (step.transition.mean - rollout.means[index].to(device)) ** 2
            tensors["mean_shift"] = shift.flatten(start_dim=1).mean(dim=1)
        output = self._objective(tensors, self._settings())
        if index not in experience.reference:
            return output
        reference = experience.reference[index]
        kl = step_kl(
            self.args.kl_kind,
            mean=step.transition.mean,
            reference_mean=self.sampler.transition(index, latents, reference).mean,
            velocity=prediction,
            reference_velocity=reference,
            std=step.transition.std,
            diffusion=step.transition.diffusion,
        )
        penalty = (experience.weights * kl).mean()
        return ObjectiveOutput(
            output.loss + self.args.beta * self.tightness * penalty, {**output.metrics, "kl": kl.detach().mean()}
        )


class DDPOTrainer(DiffusionGRPOTrainer):
    """Denoising diffusion policy optimisation (DDPO, arXiv 2305.13301) of a DDPM pipeline.

    Samples are independent; their advantages are relative to a history of rewards of the same prompt. ``loss_type`` is
    ``"ppo_clip"`` (importance-sampled, DDPO-IS) or ``"policy_gradient"`` (score function, DDPO-SF).
    See `AlignmentTrainer` for the arguments.
    """

    args: DDPOConfig

    def __init__(
        self,
        pipeline: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: DDPOConfig,
        train_dataset: PromptDataset,
        **kwargs: Any,
    ) -> None:
        super().__init__(pipeline, reward_funcs, args, train_dataset, **kwargs)
        size = args.per_prompt_stat_tracking_buffer_size if args.per_prompt_stat_tracking else 1
        # Without tracking no prompt ever reaches the count, so that the batch's statistics are used.
        least = args.per_prompt_stat_tracking_min_count if args.per_prompt_stat_tracking else 2
        self.stat_tracker = PerPromptStatTracker(size, least)
        self.add_callback(StatTrackerCallback(self.stat_tracker))

    def reward_changed(self, version: int) -> None:
        """Also forgets the history of rewards, which were of another scale."""
        super().reward_changed(version)
        self.stat_tracker.history.clear()

    def compare(self, generation: int, scores: Tensor) -> Advantages:
        """Advantages relative to each prompt's history; see `PerPromptStatTracker`."""
        rows = self.experience_maker.prompts.rows(generation, range(len(scores)))
        return self.stat_tracker.advantages([row["prompt"] for row in rows], scores, self.reward_weights)


class StatTrackerCallback(CheckpointedCallback):
    """Carries the rewards that a `PerPromptStatTracker` remembers through checkpoints.

    Args:
        tracker: the tracker.
    """

    file_name = "prompt_statistics.json"

    def __init__(self, tracker: PerPromptStatTracker) -> None:
        self.tracker = tracker

    def save_state(self, directory: str) -> None:
        """Writes ``prompt_statistics.json``."""
        Path(directory, self.file_name).write_text(json.dumps(self.tracker.state_dict()), encoding="utf-8")

    def load_state(self, directory: str) -> None:
        """Reads ``prompt_statistics.json``.

        Raises:
            ValueError: the file is missing.
        """
        path = os.path.join(directory, self.file_name)
        if not os.path.isfile(path):
            raise ValueError(f"{directory} holds no {self.file_name}; it is not a checkpoint of DDPOTrainer")
        self.tracker.load_state_dict(read_json(Path(path)))
