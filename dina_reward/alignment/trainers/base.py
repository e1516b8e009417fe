"""What all alignment trainers share, on `transformers.Trainer`: policy, experience, evaluation, logs, checkpoints."""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, set_seed

from dina_reward.alignment.config import AlignmentConfig
from dina_reward.alignment.costs import CostCallback
from dina_reward.alignment.experience.maker import Experience, ExperienceMaker, RolloutPlan
from dina_reward.alignment.experience.rewards import (
    RewardSet,
    check_columns,
    checked_reward_weights,
    is_latent_reward,
)
from dina_reward.alignment.monitoring.attached import AttachedCallback
from dina_reward.alignment.monitoring.evaluation import EvalRewardFunction, HeldOutEvaluator
from dina_reward.alignment.monitoring.hacking import RewardHackingCallback
from dina_reward.alignment.monitoring.log_cells import alignment_cells
from dina_reward.alignment.monitoring.pictures import log_pictures
from dina_reward.alignment.monitoring.tightening import TightenOnAlarm
from dina_reward.alignment.objectives.advantages import Advantages
from dina_reward.alignment.objectives.policy_gradient import ObjectiveOutput, reduction
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.prompts import BatchGeometry, PromptDataset, PromptRollouts, PromptTable
from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.backbones.wrappers import check_not_offloaded, unwrap
from dina_reward.families import family_of
from dina_reward.reward import LatentReward
from dina_reward.reward_functions import RewardFunction, reward_list, unique_names, unwrapped
from dina_reward.training.checkpointing import AtomicCheckpointMixin
from dina_reward.training.config import check_mixed_precision
from dina_reward.training.ema import EMACallback
from dina_reward.training.log_table import print_tables
from dina_reward.training.run_settings import settings_of, tensor_digest, text_digest
from dina_reward.training.sharding import keep_frozen_from_ddp


EMA_DIRECTORY = "ema"


class AlignmentTrainer(AtomicCheckpointMixin, Trainer, ABC):
    """Base of the alignment trainers: samples generations, scores and compares them, and trains on them piece by piece.

    A subclass says how samples are drawn (`plan`), into how many losses a micro-batch falls (`num_losses`) and what each of
    them is (`step_loss`). Nothing is decoded in training unless a reward function declares that it needs images.
    Checkpoints hold the policy's weights (and the EMA's in ``ema/``) beside optimizer, scheduler and random states; runs
    resume bit for bit on the CPU.

    Args:
        pipeline: a diffusers text-to-image pipeline of a supported family. Its denoiser gets a LoRA.
        reward_funcs: one or several callables; see `RewardSet` for how they are called.
        args: the configuration.
        train_dataset: prompts: a list of strings, or rows with a ``"prompt"`` and further columns.
        eval_dataset: held-out prompts; evaluated when `eval_strategy` says so.
        eval_reward_funcs: held-out judges of evaluation samples, which training never sees; they may ask for images.
        callbacks: as in `transformers.Trainer`; a `RewardHackingCallback` among them replaces the default alarm, and an
            `AttachedCallback` gets the trainer.
        optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError: the pipeline, the batch geometry or the launch do not fit together.
    """

    args: AlignmentConfig

    tightness: float = 1.0
    """How much harder than configured the policy is held: KL weights are multiplied by it, clip ranges divided."""

    def __init__(
        self,
        pipeline: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: AlignmentConfig,
        train_dataset: PromptDataset,
        eval_dataset: PromptDataset | None = None,
        eval_reward_funcs: EvalRewardFunction | Sequence[EvalRewardFunction] = (),
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        functions = reward_list(reward_funcs, "reward_funcs")
        judges = reward_list(eval_reward_funcs, "eval_reward_funcs")
        for prompts, name in ((train_dataset, "train_dataset"), (eval_dataset, "eval_dataset")):
            if prompts is not None:
                check_columns(PromptTable(prompts, name).columns, functions)
        geometry = args.geometry(args.world_size)
        denoiser = unwrap(getattr(pipeline, family_of(pipeline).denoiser_attribute))
        check_not_offloaded(denoiser)
        check_mixed_precision(denoiser.dtype, args)
        pipeline.to(args.device)
        self.policy = self._new_policy(pipeline, args)
        if not args.train_full_model:
            keep_frozen_from_ddp(self.policy.denoiser)
        self._facts = _facts_of(self.policy, train_dataset, functions)
        self.ema = None
        if args.ema_decay is not None:
            self.ema = EMACallback(self.policy.denoiser, args.ema_decay, args.ema_update_every)
        prompts = PromptRollouts(
            train_dataset,
            geometry,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        super().__init__(
            model=self.policy.denoiser,
            args=args,
            train_dataset=prompts,
            eval_dataset=eval_dataset,
            callbacks=[*(callbacks or []), *([] if self.ema is None else [self.ema])],
            optimizers=optimizers,
        )
        print_tables(self, alignment_cells)
        self._check_launch(geometry)
        self.costs = CostCallback(self.policy.calls, args, self.accelerator)
        self.add_callback(self.costs)
        self.hacking = self._hacking_callback()
        self.rewards = _reward_set(functions, args, self.policy)
        if args.merge_for_rollout and args.reward_overlap:
            _refuse_shared(self.rewards.functions)
        self.reward_weights = checked_reward_weights(args.reward_weights, len(self.rewards.functions))
        self.experience_maker = ExperienceMaker(
            self.policy, prompts, self.rewards, self.reward_weights, self._new_sampler(), args, self.accelerator
        )
        self.evaluator = self._new_evaluator(judges)
        self._generation = -1
        self._experience: dict[int, Experience] = {}
        self._metrics: dict[str, list[float]] = defaultdict(list)
        for callback in [each for each in self.callback_handler.callbacks if isinstance(each, AttachedCallback)]:
            callback.attach(self)

    @property
    def sampler(self) -> Sampler:
        """Sampler of the training rollouts."""
        return self.experience_maker.sampler

    def run_settings(self) -> dict[str, Any]:
        """The arguments that decide what is computed, with prompts, rewards and the generator's frozen weights."""
        return settings_of(self.args, **self._facts)

    def can_save_at(self, step: int) -> bool:
        """Only where a generation begins: the samples of one that has begun are not stored."""
        return step * self.args.gradient_accumulation_steps % self.args.micro_steps_per_generation == 0

    def reward_changed(self, version: int) -> None:
        """To be called when a reward function scores differently from now on; earlier rewards are not comparable.

        Args:
            version: how often it has changed so far.
        """
        self.evaluator.reward_version = version

    @property
    def can_tighten(self) -> bool:
        """Whether the loss has a KL penalty or a clip range, so that `tightness` changes it."""
        return self.args.needs_reference

    def plan(self, generation: int) -> RolloutPlan:
        """How the samples of a generation are drawn: deterministically, unless a subclass says otherwise."""
        return RolloutPlan()

    def compare(self, generation: int, scores: Tensor) -> Advantages:
        """Advantages of all rows of a generation; group-relative, unless a subclass says otherwise."""
        return self.experience_maker.group_advantages(generation, scores)

    @abstractmethod
    def num_losses(self, experience: Experience) -> int:
        """Losses, with a backward pass each, that a micro-batch falls into."""

    @abstractmethod
    def step_loss(self, model: nn.Module, experience: Experience, position: int) -> ObjectiveOutput:
        """One of the losses of a micro-batch.

        Args:
            model: the denoiser as wrapped for training.
            experience: the micro-batch.
            position: number of the loss.
        """

    def _new_policy(self, pipeline: Any, args: AlignmentConfig) -> Policy:
        set_seed(args.seed)
        policy = Policy(
            pipeline,
            rank=args.lora_rank,
            alpha=args.lora_alpha,
            target_modules=args.lora_target_modules,
            guidance_scale=args.guidance_scale,
            max_sequence_length=args.max_sequence_length,
            train_full_model=args.train_full_model,
            load_in_4bit=args.load_in_4bit,
            keep_reference=args.needs_reference,
        )
        if args.gradient_checkpointing:
            policy.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
            # Trainer would look for a method that diffusers models do not have.
            args.gradient_checkpointing = args.activation_checkpointing = False
        return policy

    def _new_sampler(self) -> Sampler:
        """Sampler of the training rollouts: of deterministic steps, unless a subclass says otherwise."""
        args = self.args
        shape = self.policy.latent_shape(args.height, args.width, args.num_frames)
        return self.policy.sampler(args.num_inference_steps, shape, device=self.accelerator.device)

    def _new_evaluator(self, judges: Sequence[EvalRewardFunction]) -> HeldOutEvaluator:
        args = self.args
        assert args.eval_height is not None
        assert args.eval_width is not None
        assert args.eval_guidance_scale is not None
        shape = self.policy.latent_shape(args.eval_height, args.eval_width, args.num_frames)
        return HeldOutEvaluator(
            self.policy,
            self.rewards,
            reward_weights=self.reward_weights,
            eval_reward_funcs=judges,
            output_dir=args.output_dir,
            sampler=self.policy.sampler(args.eval_num_inference_steps, shape, device=self.accelerator.device),
            latent_shape=shape,
            guidance_scale=args.eval_guidance_scale,
            batch_size=args.per_device_eval_batch_size,
            num_images=args.eval_num_images,
            seed=args.seed,
            accelerator=self.accelerator,
            hacking=self.hacking,
            on_picture=lambda step, picture, caption: log_pictures(self, step, picture, caption),
        )

    def _hacking_callback(self) -> RewardHackingCallback:
        """The reward-hacking alarm among the callbacks, or a new one; adds what answers it, where that is asked for."""
        if self.args.hacking_tighten > 1:
            if any(isinstance(callback, TightenOnAlarm) for callback in self.callback_handler.callbacks):
                raise ValueError(
                    "hacking_tighten adds a TightenOnAlarm, and there is one among the callbacks; drop either"
                )
            self.add_callback(TightenOnAlarm(self.args.hacking_tighten))
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RewardHackingCallback):
                return callback
        hacking = RewardHackingCallback(self.args.hacking_window, stop=self.args.hacking_stop)
        self.add_callback(hacking)
        return hacking

    def _check_launch(self, geometry: BatchGeometry) -> None:
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        if self.accelerator.num_processes != expected or geometry.num_processes != expected:
            raise ValueError(
                f"the launcher started {expected} processes but accelerate sees {self.accelerator.num_processes}: they "
                "would train separately. On CPU use `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N script.py`"
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # PromptRollouts is already in training order; ranks take their batches from it in turn.
        return SequentialSampler(self.experience_maker.prompts)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trains one micro-batch on all its losses, one backward each.

        The first micro-step of a generation samples and scores the whole generation batch before.
        """
        experience = self._experience_of(inputs)
        started = time.perf_counter()
        count = self.num_losses(experience)
        total = torch.zeros((), device=self.args.device)
        metrics: dict[str, list[Tensor]] = defaultdict(list)
        synchronised = self.accelerator.sync_gradients
        for position in range(count):
            last = position == count - 1
            # DeepSpeed makes an optimizer step with every backward while this flag is set.
            self.accelerator.sync_gradients = synchronised and last
            # DDP adds up the gradients of the losses on each rank and averages them once, with the last one.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                output = self.step_loss(model, experience, position)
                loss = output.loss / (count * self.current_gradient_accumulation_steps)
                self.accelerator.backward(loss)
            total += loss.detach()
            for name, value in output.metrics.items():
                metrics[name].append(value.detach())
        self.record(metrics)
        self._metrics["time/train"].append(time.perf_counter() - started)
        return total

    def _experience_of(self, inputs: dict[str, Tensor]) -> Experience:
        generation, first_row = int(inputs["generation"][0]), int(inputs["row"][0])
        if generation != self._generation:
            if int(inputs["iteration"][0]) != 0 or first_row >= self.experience_maker.prompts.geometry.chunk_rows:
                raise ValueError(
                    f"step {self.state.global_step} lies inside generation {generation}, whose samples are not stored; "
                    "resume from a checkpoint whose step is a multiple of the optimizer steps per generation"
                )
            self._experience = {}
            experience, metrics = self.make_experience(generation)
            selects = self.args.keep_per_group is not None
            self._experience = {part.rows[0]: part.without_unused() if selects else part for part in experience}
            self._generation = generation
            for name, value in metrics.items():
                self._metrics[name].append(value)
        return self._experience[first_row]

    def make_experience(self, generation: int) -> tuple[list[Experience], dict[str, float]]:
        """Samples, scores and compares a generation; see `ExperienceMaker.make`."""
        return self.experience_maker.make(generation, self.plan(generation), self.compare)

    def record(self, metrics: dict[str, list[Tensor]]) -> None:
        """Keeps metrics for the next log line: averaged over a micro-batch and all ranks; extremes of the ratio stay."""
        if not metrics:
            return
        reduced = [reduction(name)(torch.stack(values).float()) for name, values in metrics.items()]
        gathered = self.accelerator.gather(torch.stack(reduced)[None])
        for column, name in enumerate(metrics):
            self._metrics[name].append(float(reduction(name)(gathered[:, column])))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the run has spent (`CallCounter`) and, to training log lines, the metrics collected since the last."""
        if "loss" in logs:
            averages = {name: float(reduction(name)(torch.tensor(v))) for name, v in self._metrics.items()}
            failures = {f"rewards/{name}/failures": float(count) for name, count in self.rewards.failures.items()}
            tightness = {} if self.tightness == 1 else {"tightness": self.tightness}
            logs = {**logs, **averages, **failures, **tightness}
            self._metrics.clear()
        super().log({**logs, **self.costs.costs().as_metrics()}, start_time)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: PromptDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates held-out prompts, with the EMA weights if there are any; see `HeldOutEvaluator`.

        Returns:
            Means over the prompts, as ``eval_reward`` and ``eval_<judge>``.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate() needs held-out prompts; give the trainer an eval_dataset")
        started = time.perf_counter()
        costs = self.costs.costs().as_metrics()
        with self.costs.paused(), self.averaged_policy():
            record = self.evaluator.evaluate(dataset, self.state.global_step, costs)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in record.metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def averaged_policy(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the policy has its EMA weights; does nothing without EMA."""
        return contextlib.nullcontext() if self.ema is None else self.ema.average_parameters()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the policy's weights, and those of its moving average to ``ema/``."""
        directory = self.args.output_dir if output_dir is None else output_dir
        # Sharded weights are gathered by all ranks, so all of them come here.
        self.policy.save_weights(directory, write=self.args.should_save)
        if self.ema is not None:
            with self.averaged_policy():
                self.policy.save_weights(os.path.join(directory, EMA_DIRECTORY), write=self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_weights(resume_from_checkpoint)
        # Samples that this process may still hold are of other weights.
        self._generation = -1


def _reward_set(functions: Sequence[RewardFunction], args: AlignmentConfig, policy: Policy) -> RewardSet:
    settings: dict[str, Any] = {
        "noise_level": args.reward_noise_level,
        "ensemble": args.reward_ensemble,
        "num_noise_samples": args.reward_num_noise_samples,
    }
    if args.reward_kappa:
        for function in map(unwrapped, functions):
            if is_latent_reward(function) and not isinstance(function, LatentReward):
                raise ValueError(
                    f"reward_kappa={args.reward_kappa} needs a LatentReward; {type(function).__name__} scores on a server, "
                    "which gives no spread"
                )
        settings |= {"kappa": args.reward_kappa, "spread": args.reward_spread}

    return RewardSet(functions, settings, policy.decode)


def _refuse_shared(functions: Sequence[RewardFunction]) -> None:
    """Rewards that would score on weights into which the next samples' LoRA is merged."""
    for function in map(unwrapped, functions):
        if isinstance(function, LatentReward) and function.shares_backbone:
            raise ValueError(
                "merge_for_rollout and reward_overlap exclude each other with a reward on the generator's own weights: it "
                "would score while the LoRA is merged into them; drop one, or load the reward with share_backbone=False"
            )


def _facts_of(policy: Policy, prompts: PromptDataset, functions: Sequence[RewardFunction]) -> dict[str, Any]:
    """What defines a run besides its arguments; to be taken before anything is sharded."""
    table = PromptTable(prompts, "train_dataset")
    latent = [function for function in map(unwrapped, functions) if is_latent_reward(function)]
    return {
        "prompts": text_digest([table[index] for index in range(len(table))]),
        "reward functions": unique_names(functions),
        "latent rewards": [_weights_digest(reward) for reward in latent],
        "frozen weights": tensor_digest(p for p in policy.denoiser.parameters() if not p.requires_grad),
    }


def _weights_digest(reward: Any) -> str:
    """Of a latent reward's LoRA and head, wherever it is scored."""
    local = isinstance(reward, LatentReward)
    return tensor_digest(reward.model.trainable_state().values()) if local else reward.weights_digest()
