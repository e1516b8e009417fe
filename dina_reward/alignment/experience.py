"""Turns a generation number into experience: rollouts, rewards and advantages of this rank's micro-batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.advantages import Advantages, compute_advantages
from dina_reward.alignment.config import DiffusionGRPOConfig
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.prompts import PromptRollouts
from dina_reward.alignment.rewards import RewardSet
from dina_reward.alignment.rollout import Rollout, Schedule, draw_sde_window, sample
from dina_reward.alignment.seeding import Stream, noise_by_row
from dina_reward.families.base import Conditioning
from dina_reward.noise_draws import fold_seed


@dataclass(frozen=True)
class Experience:
    """One micro-batch of one rank, ready to be trained on.

    Args:
        rows (`range`): row numbers in the generation batch.
        rollout (`Rollout`): samples and recorded steps.
        conditioning (`Conditioning`): the different prompts of this rank's part of the generation batch.
        prompt_index (`list[int]`): for each row its prompt in ``conditioning``.
        negative (`Conditioning`, *optional*): the empty prompt, one row, with classifier-free guidance.
        advantages (`Tensor`): shape ``(batch,)``, float32.
        reference_velocity (`Tensor`, *optional*): of the model without LoRA at the recorded steps, shape
            ``(batch, window, ...)``, float32; with a KL penalty only.
    """

    rows: range
    rollout: Rollout
    conditioning: Conditioning
    prompt_index: list[int]
    negative: Conditioning | None
    advantages: Tensor
    reference_velocity: Tensor | None


@dataclass(frozen=True)
class _Chunk:
    rows: range
    prompt_rows: list[dict[str, Any]]
    prompt_index: list[int]
    rollout: Rollout
    reference_velocity: Tensor | None


class ExperienceMaker:
    """Samples, scores and compares the rows of a generation.

    Everything random is a function of ``(seed, generation, row)``, so results depend neither on the split of the batch
    over ranks nor on what ran before. Rollouts run in chunks with the rows of the training micro-batches: the replayed
    log-probabilities then equal the recorded ones bit for bit as long as the weights are the same.

    Args:
        policy: the generator.
        prompts: which rows belong to a generation.
        rewards: the reward functions.
        args: the configuration.
        accelerator: the `accelerate.Accelerator` of the run.
    """

    def __init__(
        self, policy: Policy, prompts: PromptRollouts, rewards: RewardSet, args: DiffusionGRPOConfig, accelerator: Any
    ) -> None:
        self.policy = policy
        self.prompts = prompts
        self.rewards = rewards
        self.args = args
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.schedule = Schedule.from_scheduler(policy.pipeline.scheduler, args.num_inference_steps, self.device)
        self.latent_shape = policy.latent_shape(args.height, args.width)
        self.reward_weights = _reward_weights(args.reward_weights, len(rewards.functions))

    @torch.no_grad()
    def make(self, generation: int) -> tuple[list[Experience], dict[str, float]]:
        """Experience of one generation, one element per micro-batch of this rank, and metrics over all ranks."""
        started = time.perf_counter()
        geometry, rank = self.prompts.geometry, self.accelerator.process_index
        row_ranges = [geometry.rows_of(chunk, rank) for chunk in range(geometry.num_chunks)]
        conditioning, prompt_rows, prompt_index = self._encode(
            generation, [row for part in row_ranges for row in part]
        )
        negative = self.policy.encode_negative(self.device)
        window = self._window(generation)
        chunks = []
        for number, rows in enumerate(row_ranges):
            part = slice(number * len(rows), (number + 1) * len(rows))
            bound = self.policy.bind(conditioning[prompt_index[part]], negative)
            rollout = sample(
                bound,
                self._initial_latents(generation, rows),
                self.schedule,
                window=window,
                step_noise=self._step_noise(generation, rows, len(window)),
                sde_type=self.args.sde_type,
                eta=self.args.eta,
            )
            reference = self._reference_velocity(bound, rollout) if self.args.beta > 0 else None
            chunks.append(_Chunk(rows, prompt_rows[part], prompt_index[part], rollout, reference))
        sampled = time.perf_counter()
        scores = [self._score(generation, chunk, conditioning) for chunk in chunks]
        scored = time.perf_counter()
        all_scores, result = self._compare(scores, row_ranges)
        experience = [
            Experience(
                rows=chunk.rows,
                rollout=chunk.rollout,
                conditioning=conditioning,
                prompt_index=chunk.prompt_index,
                negative=negative,
                advantages=result.advantages[chunk.rows.start : chunk.rows.stop].to(self.device),
                reference_velocity=chunk.reference_velocity,
            )
            for chunk in chunks
        ]
        timings = {"time/rollout": sampled - started, "time/reward": scored - sampled}
        return experience, {**self._metrics(all_scores, result, window), **timings}

    def _encode(self, generation: int, rows: Sequence[int]) -> tuple[Conditioning, list[dict[str, Any]], list[int]]:
        prompt_rows = self.prompts.rows(generation, rows)
        unique = list(dict.fromkeys(row["prompt"] for row in prompt_rows))
        position = {prompt: index for index, prompt in enumerate(unique)}
        conditioning = self.policy.encode(unique, self.device)
        return conditioning, prompt_rows, [position[row["prompt"]] for row in prompt_rows]

    def _window(self, generation: int) -> range:
        size, bounds = self.args.sde_window_size, self.args.sde_window_range
        assert size is not None
        assert bounds is not None
        return draw_sde_window(self.args.seed, generation, size, (bounds[0], bounds[1]))

    def _initial_latents(self, generation: int, rows: Sequence[int]) -> Tensor:
        shared = self.args.same_latent_within_group
        keys = [self.prompts.group_of(row) if shared else row for row in rows]
        seeds = [fold_seed(self.args.seed, Stream.INITIAL_LATENTS, generation, key) for key in keys]
        return noise_by_row(seeds, self.latent_shape).to(self.device, self.policy.storage_dtype)

    def _step_noise(self, generation: int, rows: Sequence[int], steps: int) -> Tensor:
        seeds = [fold_seed(self.args.seed, Stream.STEP_NOISE, generation, row) for row in rows]
        return noise_by_row(seeds, (steps, *self.latent_shape)).to(self.device)

    def _reference_velocity(self, bound: Any, rollout: Rollout) -> Tensor:
        batch = rollout.latents.shape[0]
        with self.policy.reference():
            velocities = [
                bound(rollout.trajectory[:, position], self.schedule.timesteps[index].expand(batch))
                for position, index in enumerate(rollout.window)
            ]
        return torch.stack(velocities, dim=1)

    def _score(self, generation: int, chunk: _Chunk, conditioning: Conditioning) -> Tensor:
        shared = self.args.share_noise_within_group
        keys = [self.prompts.group_of(row) if shared else row for row in chunk.rows]
        seeds = [fold_seed(self.args.seed, Stream.REWARD_NOISE, generation, key) for key in keys]
        return self.rewards.score(
            chunk.rollout.latents, chunk.prompt_rows, conditioning[chunk.prompt_index], seeds
        ).to(self.device)

    def _compare(self, scores: list[Tensor], row_ranges: list[range]) -> tuple[Tensor, Advantages]:
        """Gathers the scores of all ranks in row order and computes advantages on every rank alike."""
        rows = torch.tensor([row for part in row_ranges for row in part], dtype=torch.int64, device=self.device)
        rows, gathered = self.accelerator.gather(rows), self.accelerator.gather(torch.cat(scores))
        ordered = gathered[rows.argsort()].cpu()
        # Row numbers identify groups, so ids stay integers and never travel as text or floats.
        group_ids = torch.arange(len(ordered)) // self.prompts.geometry.num_generations
        result = compute_advantages(
            ordered,
            group_ids,
            reward_weights=self.reward_weights,
            scale_rewards=self.args.scale_rewards,
            multi_objective_aggregation=self.args.multi_objective_aggregation,
        )
        return ordered, result

    def _metrics(self, scores: Tensor, result: Advantages, window: range) -> dict[str, float]:
        metrics = {
            "reward": float(result.rewards.mean()),
            "reward_std": float(result.group_std.mean()),
            "frac_reward_zero_std": float(result.frac_reward_zero_std),
            "sde_window_start": float(window.start),
        }
        for name, column in zip(self.rewards.names, scores.unbind(dim=1), strict=True):
            metrics[f"rewards/{name}/mean"] = float(column.mean())
            metrics[f"rewards/{name}/std"] = float(column.std())
        return metrics


def _reward_weights(weights: list[float] | None, functions: int) -> list[float]:
    if functions == 0:
        raise ValueError("reward_funcs is empty; give at least one callable")
    if weights is not None and len(weights) != functions:
        raise ValueError(f"reward_weights has {len(weights)} entries for {functions} reward functions; give one each")
    return [1.0] * functions if weights is None else list(weights)
