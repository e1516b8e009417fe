"""Turns a generation number into experience: rollouts, rewards and advantages of this rank's micro-batches."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dina_reward.alignment.config import AlignmentConfig
from dina_reward.alignment.experience.diversity import diversity
from dina_reward.alignment.experience.overlap import scoring
from dina_reward.alignment.experience.rewards import RewardSet
from dina_reward.alignment.experience.silence import SilentRewards
from dina_reward.alignment.objectives.advantages import Advantages, compute_advantages, extremes
from dina_reward.alignment.objectives.credit import gains_to_go
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.prompts import PromptRollouts
from dina_reward.alignment.sampling.rollout import PredictFunction, Rollout, sample
from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.alignment.sampling.seeding import Stream, noise_by_row
from dina_reward.families import Conditioning
from dina_reward.noise.draws import fold_seed


@dataclass(frozen=True)
class RolloutPlan:
    """How the samples of one generation are drawn, the same for all rows and ranks.

    Args:
        stochastic: stochastic steps; none: the deterministic sampler.
        trained: those of them that are recorded; all by default.
        keep_means: record the means of the transitions.
        reference: evaluate the model without LoRA at the recorded states.
        credit_discount: with a number, each recorded step gets its own advantage; see `objectives.credit`.
        solver_order: of the deterministic steps; see `sampling.solver.MultistepSolver`.
    """

    stochastic: Sequence[int] = ()
    trained: Sequence[int] | None = None
    keep_means: bool = False
    reference: bool = False
    credit_discount: float | None = None
    solver_order: int = 1


@dataclass(frozen=True)
class Experience:
    """One micro-batch of one rank, ready to be trained on.

    Args:
        generation (`int`): which one.
        rows (`Sequence[int]`): row numbers in the generation batch.
        rollout (`Rollout`): samples and recorded steps.
        prompts (`list[str]`): one per row.
        conditioning (`Conditioning`): the different prompts of this rank's part of the generation batch.
        prompt_index (`list[int]`): for each row its prompt in ``conditioning``.
        negative (`Conditioning`, *optional*): the empty prompt, one row, with classifier-free guidance.
        rewards (`Tensor`): weighted sum of the rewards, shape ``(batch,)``, float32.
        advantages (`Tensor`): shape ``(batch,)``, float32.
        weights (`Tensor`): weight of each row in the loss, shape ``(batch,)``; 0 for rows that are left out, and such
            that the mean over the generation batch is 1.
        step_advantages (`dict[int, Tensor]`): with step-wise credit, the advantage of each recorded step.
        reference (`dict[int, Tensor]`): predictions of the model without LoRA at the recorded steps, float32; only with a
            KL penalty.
    """

    generation: int
    rows: Sequence[int]
    rollout: Rollout
    prompts: list[str]
    conditioning: Conditioning
    prompt_index: list[int]
    negative: Conditioning | None
    rewards: Tensor
    advantages: Tensor
    weights: Tensor
    step_advantages: dict[int, Tensor] = field(default_factory=dict)
    reference: dict[int, Tensor] = field(default_factory=dict)

    def advantages_at(self, step: int) -> Tensor:
        """Advantages that train a recorded step, shape ``(batch,)``."""
        return self.step_advantages.get(step, self.advantages)

    def conditioning_rows(self) -> Conditioning:
        """Encoded prompts, one row per sample."""
        return self.conditioning[self.prompt_index]

    def without_unused(self) -> Experience:
        """The rows that count in the loss, so weighted that its mean over them is the one over all rows.

        Where no row counts, one stays, with weight 0, since all ranks make the same backward passes.
        """
        index = self.weights.nonzero()[:, 0].cpu()
        index = torch.zeros(1, dtype=torch.int64) if len(index) == 0 else index
        chosen, on_device = index.tolist(), index.to(self.weights.device)
        return replace(
            self,
            rows=[self.rows[row] for row in chosen],
            rollout=self.rollout.of_rows(index),
            prompts=[self.prompts[row] for row in chosen],
            prompt_index=[self.prompt_index[row] for row in chosen],
            rewards=self.rewards[on_device],
            advantages=self.advantages[on_device],
            weights=self.weights[on_device] * (len(chosen) / len(self.weights)),
            step_advantages={step: values[on_device] for step, values in self.step_advantages.items()},
            reference={step: values[on_device] for step, values in self.reference.items()},
        )


@dataclass(frozen=True)
class _Chunk:
    rows: range
    prompt_rows: list[dict[str, Any]]
    prompt_index: list[int]
    rollout: Rollout
    reference: dict[int, Tensor]


class ExperienceMaker:
    """Samples, scores and compares the rows of a generation.

    Everything random is a function of ``(seed, generation, row)``, so results depend neither on the split of the batch
    over ranks nor on what ran before. Rollouts run in chunks with the rows of the training micro-batches, unless
    `rollout_batch_size` says otherwise: the replayed log-probabilities then equal the recorded ones bit for bit as long as
    the weights are the same.

    Args:
        policy: the generator.
        prompts: which rows belong to a generation.
        rewards: the reward functions.
        reward_weights: one weight per reward function.
        sampler: of the rollouts.
        args: the configuration.
        accelerator: the `accelerate.Accelerator` of the run.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: PromptRollouts,
        rewards: RewardSet,
        reward_weights: Sequence[float],
        sampler: Sampler,
        args: AlignmentConfig,
        accelerator: Any,
    ) -> None:
        self.policy = policy
        self.prompts = prompts
        self.rewards = rewards
        self.reward_weights = list(reward_weights)
        self.sampler = sampler
        self.args = args
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.latent_shape = policy.latent_shape(args.height, args.width, args.num_frames)
        self.silent_rewards = SilentRewards(rewards.names, self.reward_weights)

    @torch.no_grad()
    def make(
        self,
        generation: int,
        plan: RolloutPlan | None = None,
        compare: Callable[[int, Tensor], Advantages] | None = None,
    ) -> tuple[list[Experience], dict[str, float]]:
        """Experience of one generation, one element per micro-batch of this rank, and metrics over all ranks.

        Args:
            generation: its number.
            plan: how samples are drawn; deterministically by default.
            compare: makes advantages of the scores of all rows, shape ``(rows, reward functions)``; by default
                `group_advantages`.
        """
        plan = RolloutPlan() if plan is None else plan
        started = time.perf_counter()
        rows = self._row_ranges()
        conditioning, prompt_rows, prompt_index = self.encode(generation, [row for part in rows for row in part])
        negative = self.policy.encode_negative(self.device)
        chunks: list[_Chunk] = []
        with scoring(overlap=self.args.reward_overlap) as start:
            finals, predictions = [], []
            for chunk in self._sample(generation, plan, conditioning, negative, prompt_rows, prompt_index):
                chunks.append(chunk)
                finals.append(start(partial(self._score, generation, chunk, conditioning, chunk.rollout.latents)))
                if chunk.rollout.clean:
                    predictions.append(start(partial(self._score_predictions, generation, chunk, conditioning)))
            sampled = time.perf_counter()
            scores, along = [result() for result in finals], [result() for result in predictions]
        scored = time.perf_counter()
        all_scores = self._gather(chunks, scores)
        heard = self.silent_rewards.check(generation, all_scores)
        result = (self.group_advantages if compare is None else compare)(generation, all_scores)
        steps = self._step_advantages(generation, chunks, along, result, plan)
        weights = self._weights(result)
        experience = [
            Experience(
                generation=generation,
                rows=chunk.rows,
                rollout=replace(chunk.rollout, clean={}),
                prompts=[row["prompt"] for row in chunk.prompt_rows],
                conditioning=conditioning,
                prompt_index=chunk.prompt_index,
                negative=negative,
                rewards=self._part(result.rewards, chunk),
                advantages=self._part(result.advantages, chunk),
                weights=self._part(weights, chunk),
                step_advantages={step: self._part(values, chunk) for step, values in steps.items()},
                reference=chunk.reference,
            )
            for chunk in chunks
        ]
        metrics = self._metrics(all_scores, result, chunks)
        if not heard:  # a mean over nothing
            metrics["reward"] = metrics["reward_std"] = math.nan
        return experience, {**metrics, "time/rollout": sampled - started, "time/reward": scored - sampled}

    def group_advantages(self, generation: int, scores: Tensor) -> Advantages:
        """Advantages relative to the group, for the scores of all rows in row order."""
        # Row numbers identify groups, so ids stay integers and never travel as text or floats.
        return compute_advantages(
            scores,
            torch.arange(len(scores)) // self.prompts.geometry.num_generations,
            reward_weights=self.reward_weights,
            scale_rewards=self.args.scale_rewards,
            multi_objective_aggregation=self.args.multi_objective_aggregation,
        )

    def initial_latents(self, generation: int, rows: Sequence[int]) -> Tensor:
        """Noise that rows start from, shape ``(rows, ...)``, storage dtype, on the device."""
        shared = self.args.same_latent_within_group
        keys = [self.prompts.group_of(row) if shared else row for row in rows]
        seeds = [fold_seed(self.args.seed, Stream.INITIAL_LATENTS, generation, key) for key in keys]
        return noise_by_row(seeds, self.latent_shape).to(self.device, self.policy.storage_dtype)

    def reward_seeds(self, generation: int, rows: Sequence[int]) -> list[int]:
        """Seeds of the reward's own noise, one per row."""
        shared = self.args.share_noise_within_group
        keys = [self.prompts.group_of(row) if shared else row for row in rows]
        return [fold_seed(self.args.seed, Stream.REWARD_NOISE, generation, key) for key in keys]

    def encode(self, generation: int, rows: Sequence[int]) -> tuple[Conditioning, list[dict[str, Any]], list[int]]:
        """Conditioning of the different prompts of some rows, their dataset rows, and each row's place in the former."""
        prompt_rows = self.prompts.rows(generation, rows)
        unique = list(dict.fromkeys(row["prompt"] for row in prompt_rows))
        position = {prompt: index for index, prompt in enumerate(unique)}
        conditioning = self.policy.encode(unique, self.device)
        return conditioning, prompt_rows, [position[row["prompt"]] for row in prompt_rows]

    def _row_ranges(self) -> list[range]:
        """Rows of each micro-batch of this rank."""
        geometry, rank = self.prompts.geometry, self.accelerator.process_index
        return [geometry.rows_of(chunk, rank) for chunk in range(geometry.num_chunks)]

    def _sample(
        self,
        generation: int,
        plan: RolloutPlan,
        conditioning: Conditioning,
        negative: Conditioning | None,
        prompt_rows: list[dict[str, Any]],
        prompt_index: list[int],
    ) -> Iterator[_Chunk]:
        parts, size = self._row_ranges(), self.args.per_device_train_batch_size
        together = self.args.micro_batches_per_rollout()
        for first in range(0, len(parts), together):
            chosen = parts[first : first + together]
            rows = [row for part in chosen for row in part]
            bound = self.policy.bind(conditioning[prompt_index[first * size : first * size + len(rows)]], negative)
            with self.policy.merged() if self.args.merge_for_rollout else contextlib.nullcontext():
                rollout = sample(
                    bound,
                    self.initial_latents(generation, rows),
                    self.sampler,
                    solver_order=plan.solver_order,
                    stochastic=plan.stochastic,
                    trained=plan.trained,
                    step_noise=self._step_noise(generation, rows, len(plan.stochastic)),
                    keep_means=plan.keep_means,
                    keep_clean=plan.credit_discount is not None,
                    offload=self.args.offload_trajectories,
                )
            reference = self._reference(bound, rollout) if plan.reference else {}
            for number, (part, own, predictions) in enumerate(_split(chosen, rollout, reference), first):
                place = slice(number * size, (number + 1) * size)
                yield _Chunk(part, prompt_rows[place], prompt_index[place], own, predictions)

    def _step_noise(self, generation: int, rows: Sequence[int], steps: int) -> Tensor | None:
        if not steps:
            return None
        seeds = [fold_seed(self.args.seed, Stream.STEP_NOISE, generation, row) for row in rows]
        return noise_by_row(seeds, (steps, *self.latent_shape)).to(self.device)

    def _reference(self, bound: PredictFunction, rollout: Rollout) -> dict[int, Tensor]:
        batch = rollout.latents.shape[0]
        with self.policy.reference():
            return {
                index: bound(rollout.states[index].to(self.device), self.sampler.timesteps[index].expand(batch))
                for index in rollout.trained
            }

    def _score(self, generation: int, chunk: _Chunk, conditioning: Conditioning, latents: Tensor) -> Tensor:
        self.policy.calls.count_rewards(len(chunk.rows))
        return self.rewards.score(
            latents,
            chunk.prompt_rows,
            conditioning[chunk.prompt_index],
            self.reward_seeds(generation, chunk.rows),
        )

    def _score_predictions(self, generation: int, chunk: _Chunk, conditioning: Conditioning) -> Tensor:
        """Scores of the recorded ``x_0`` predictions, shape ``(rows, predictions, functions)``.

        They see the noise that the final latents see, so that it cancels along a trajectory.
        """
        predictions = [latents.to(self.device) for _, latents in sorted(chunk.rollout.clean.items())]
        return torch.stack([self._score(generation, chunk, conditioning, clean) for clean in predictions], dim=1)

    def _gather(self, chunks: Sequence[_Chunk], values: Sequence[Tensor]) -> Tensor:
        """Values of the rows of all ranks, in row order, on the CPU."""
        rows = torch.tensor([row for chunk in chunks for row in chunk.rows], dtype=torch.int64, device=self.device)
        rows, gathered = (
            self.accelerator.gather(rows),
            self.accelerator.gather(torch.cat(list(values)).to(self.device)),
        )
        return gathered[rows.argsort()].cpu()

    def _part(self, values: Tensor, chunk: _Chunk) -> Tensor:
        return values[chunk.rows.start : chunk.rows.stop].to(self.device)

    def _step_advantages(
        self,
        generation: int,
        chunks: Sequence[_Chunk],
        along: Sequence[Tensor],
        result: Advantages,
        plan: RolloutPlan,
    ) -> dict[int, Tensor]:
        if plan.credit_discount is None:
            return {}
        scores = self._gather(chunks, along).unbind(dim=1)
        values = torch.stack([self.group_advantages(generation, column).rewards for column in scores], dim=1)
        gains = gains_to_go(values, result.rewards, plan.credit_discount).where(result.valid[:, None], torch.nan)
        rollout = chunks[0].rollout
        position = {state: column for column, state in enumerate(sorted(rollout.clean))}
        group_ids = torch.arange(len(gains)) // self.prompts.geometry.num_generations
        return {
            step: compute_advantages(
                gains[:, position[step]], group_ids, scale_rewards=self.args.scale_rewards
            ).advantages
            for step in rollout.trained
        }

    def _weights(self, result: Advantages) -> Tensor:
        kept = result.valid.clone()
        if self.args.filter_zero_std_groups:
            kept &= ~result.zero_std
        if self.args.keep_per_group is not None:
            kept &= extremes(result.advantages, result.valid, self.args.num_generations, self.args.keep_per_group)
        weights = kept.float()
        return weights / weights.mean().clamp(min=1e-12)

    def _metrics(self, scores: Tensor, result: Advantages, chunks: Sequence[_Chunk]) -> dict[str, float]:
        latents = torch.cat([chunk.rollout.latents for chunk in chunks])
        groups = torch.tensor([self.prompts.group_of(row) for chunk in chunks for row in chunk.rows])
        local = torch.tensor([diversity(latents, groups)], device=self.device)
        metrics = {
            "reward": float(result.rewards.mean()),
            "reward_std": float(result.group_std.mean()),
            "frac_reward_zero_std": float(result.frac_reward_zero_std),
        }
        spread = float(self.accelerator.gather(local).nanmean())
        if not math.isnan(spread):  # groups of one sample have none
            metrics["diversity"] = spread
        for name, column in zip(self.rewards.names, scores.unbind(dim=1), strict=True):
            applies = column[~column.isnan()]
            if len(applies) == 0:
                continue
            metrics[f"rewards/{name}/mean"] = float(applies.mean())
            metrics[f"rewards/{name}/std"] = float(applies.std()) if len(applies) > 1 else 0.0
        if chunks[0].rollout.stochastic:
            metrics["sde_window_start"] = float(chunks[0].rollout.stochastic[0])
        return metrics


def _split(
    parts: Sequence[range], rollout: Rollout, reference: dict[int, Tensor]
) -> Iterator[tuple[range, Rollout, dict[int, Tensor]]]:
    """Micro-batches that were sampled at once."""
    if len(parts) == 1:
        yield parts[0], rollout, reference
        return
    for part, index in zip(parts, torch.arange(len(rollout.latents)).split(len(parts[0])), strict=True):
        own = {step: values[index.to(values.device)] for step, values in reference.items()}
        yield part, rollout.of_rows(index), own
