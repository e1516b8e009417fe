"""Flow-GRPO on `transformers.Trainer`: aligns a diffusers pipeline with rewards on its latents."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, set_seed

from dina_reward.alignment.config import DiffusionGRPOConfig
from dina_reward.alignment.evaluation import Evaluator, HeldOutEvaluator
from dina_reward.alignment.experience import Experience, ExperienceMaker
from dina_reward.alignment.objectives import ObjectiveOutput, ObjectiveSettings, get_objective, step_kl
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.prompts import BatchGeometry, PromptDataset, PromptRollouts
from dina_reward.alignment.rewards import RewardFunction, RewardSet
from dina_reward.alignment.steps import replay_step, transition
from dina_reward.training.checkpointing import AtomicCheckpointMixin
from dina_reward.training.ema import EMACallback


EMA_DIRECTORY = "ema"


class DiffusionGRPOTrainer(AtomicCheckpointMixin, Trainer):
    """Group-relative policy optimisation of a flow-matching pipeline (Flow-GRPO, arXiv 2505.05470).

    Each generation samples groups of latents that share a prompt, with stochastic steps inside an SDE window, scores the
    final latents and trains a LoRA on the recorded steps. Nothing is decoded in training. Classifier-free guidance,
    several rewards, KL to the model without LoRA, EMA, DDP and bit-exact resume are supported; FSDP and DeepSpeed are
    not. Checkpoints hold ``pytorch_lora_weights.safetensors`` (and the EMA's in ``ema/``), which
    ``pipeline.load_lora_weights`` reads.

    Example:
        >>> trainer = DiffusionGRPOTrainer(pipe, reward, DiffusionGRPOConfig("out"), train_dataset=["a cat", "a dog"])
        >>> trainer.train()

    Args:
        pipeline: a diffusers text-to-image pipeline of a supported flow-matching family. Its denoiser gets a LoRA.
        reward_funcs: one or several callables; see `RewardSet` for how they are called.
        args: the configuration.
        train_dataset: prompts: a list of strings, or rows with a ``"prompt"`` and further columns.
        eval_dataset: held-out prompts; evaluated when `eval_strategy` says so.
        evaluators: judges of decoded held-out images; see `dina_reward.alignment.evaluation.Evaluator`.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError: the pipeline, the batch geometry or the launch do not fit together.
    """

    args: DiffusionGRPOConfig

    def __init__(
        self,
        pipeline: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: DiffusionGRPOConfig,
        train_dataset: PromptDataset,
        eval_dataset: PromptDataset | None = None,
        evaluators: Evaluator | Sequence[Evaluator] = (),
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        geometry = _geometry(args)
        pipeline.to(args.device)
        self.policy = _new_policy(pipeline, args)
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
        self._check_launch(geometry)
        rewards = _reward_set(reward_funcs, args)
        self.experience_maker = ExperienceMaker(self.policy, prompts, rewards, args, self.accelerator)
        self.evaluator = HeldOutEvaluator(
            self.policy,
            rewards,
            reward_weights=self.experience_maker.reward_weights,
            evaluators=[evaluators] if callable(evaluators) else evaluators,
            output_dir=args.output_dir,
            height=args.height,
            width=args.width,
            num_inference_steps=args.eval_num_inference_steps,
            batch_size=args.per_device_eval_batch_size,
            num_images=args.eval_num_images,
            seed=args.seed,
            accelerator=self.accelerator,
        )
        assert args.epsilon_high is not None
        self._objective = get_objective(args.loss_type)
        self._settings = ObjectiveSettings(args.epsilon, args.epsilon_high, args.advantage_clip)
        self._generation = -1
        self._experience: dict[int, Experience] = {}
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def _check_launch(self, geometry: BatchGeometry) -> None:
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        if self.accelerator.num_processes != expected or geometry.num_processes != expected:
            raise ValueError(
                f"the launcher started {expected} processes but accelerate sees {self.accelerator.num_processes}: they "
                "would train separately. On CPU use `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N script.py`"
            )
        if self.is_fsdp_enabled or self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("DiffusionGRPOTrainer trains a LoRA with DDP; FSDP and DeepSpeed are not supported")

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # PromptRollouts is already in training order; ranks take their batches from it in turn.
        return SequentialSampler(self.experience_maker.prompts)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trains one micro-batch on all steps of its window, one backward per step.

        The first micro-step of a generation samples and scores the whole generation batch before.
        """
        experience = self._experience_of(inputs)
        started = time.perf_counter()
        steps = len(experience.rollout.window)
        total = torch.zeros((), device=self.args.device)
        metrics: dict[str, list[Tensor]] = defaultdict(list)
        for position in range(steps):
            last = position == steps - 1
            # DDP adds up the gradients of the window on each rank and averages them once, with the last step.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                output = self.step_loss(model, experience, position)
                loss = output.loss / (steps * self.current_gradient_accumulation_steps)
                self.accelerator.backward(loss)
            total += loss.detach()
            for name, value in output.metrics.items():
                metrics[name].append(value)
        self._record(metrics)
        self._metrics["time/train"].append(time.perf_counter() - started)
        return total

    def step_loss(self, model: nn.Module, experience: Experience, position: int) -> ObjectiveOutput:
        """Objective, plus KL penalty, of one recorded step of one micro-batch.

        Args:
            model: the denoiser as wrapped for training.
            experience: the micro-batch.
            position: number of the step inside the window.
        """
        args, schedule, rollout = self.args, self.experience_maker.schedule, experience.rollout
        index = rollout.window[position]
        latents = rollout.trajectory[:, position]
        sigma, sigma_next = schedule.sigmas[index], schedule.sigmas[index + 1]
        bound = self.policy.bind(experience.conditioning[experience.prompt_index], experience.negative, model)
        velocity = bound(latents, schedule.timesteps[index].expand(latents.shape[0]))
        step = replay_step(
            args.sde_type,
            latents,
            velocity,
            sigma,
            sigma_next,
            args.eta,
            next_latents=rollout.trajectory[:, position + 1],
        )
        tensors = {
            "log_prob": step.log_prob,
            "old_log_prob": rollout.log_probs[:, position],
            "advantages": experience.advantages,
        }
        output = self._objective(tensors, self._settings)
        if experience.reference_velocity is None:
            return output
        reference_velocity = experience.reference_velocity[:, position]
        reference = transition(args.sde_type, latents, reference_velocity, sigma, sigma_next, args.eta)
        kl = step_kl(
            args.kl_kind,
            mean=step.transition.mean,
            reference_mean=reference.mean,
            velocity=velocity,
            reference_velocity=reference_velocity,
            std=step.transition.std,
            diffusion=step.transition.diffusion,
        ).mean()
        return ObjectiveOutput(output.loss + args.beta * kl, {**output.metrics, "kl": kl.detach()})

    def _experience_of(self, inputs: dict[str, Tensor]) -> Experience:
        generation, first_row = int(inputs["generation"][0]), int(inputs["row"][0])
        if generation != self._generation:
            if int(inputs["iteration"][0]) != 0 or first_row >= self.experience_maker.prompts.geometry.chunk_rows:
                raise ValueError(
                    f"step {self.state.global_step} lies inside generation {generation}, whose samples are not stored; "
                    "resume from a checkpoint whose step is a multiple of the optimizer steps per generation"
                )
            self._experience = {}
            experience, metrics = self.experience_maker.make(generation)
            self._generation, self._experience = generation, {part.rows.start: part for part in experience}
            for name, value in metrics.items():
                self._metrics[name].append(value)
        return self._experience[first_row]

    def _record(self, metrics: dict[str, list[Tensor]]) -> None:
        """Averages over the window and all ranks; the extremes of the ratio stay extremes."""
        if not metrics:
            return
        reduced = [_reduction(name)(torch.stack(values)) for name, values in metrics.items()]
        gathered = self.accelerator.gather(torch.stack(reduced)[None])
        for column, name in enumerate(metrics):
            self._metrics[name].append(float(_reduction(name)(gathered[:, column])))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics collected since the last training log line."""
        if "loss" in logs:
            averages = {name: float(_reduction(name)(torch.tensor(v))) for name, v in self._metrics.items()}
            logs = {**logs, **averages}
            self._metrics.clear()
        super().log(logs, start_time)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: PromptDataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates held-out prompts, with the EMA weights if there are any; see `HeldOutEvaluator`.

        Returns:
            Means over the prompts, as ``eval_reward`` and ``eval_<evaluator>``.
        """
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate() needs held-out prompts; give the trainer an eval_dataset")
        started = time.perf_counter()
        with self.averaged_policy():
            record = self.evaluator.evaluate(dataset, self.state.global_step)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in record.metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - started, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def averaged_policy(self) -> contextlib.AbstractContextManager[None]:
        """Context in which the policy has its EMA weights; does nothing without EMA."""
        return contextlib.nullcontext() if self.ema is None else self.ema.average_parameters()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = self.args.output_dir if output_dir is None else output_dir
        self.policy.save_lora(directory)
        if self.ema is not None:
            with self.averaged_policy():
                self.policy.save_lora(os.path.join(directory, EMA_DIRECTORY))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_lora(resume_from_checkpoint)


def _geometry(args: DiffusionGRPOConfig) -> BatchGeometry:
    assert args.steps_per_generation is not None
    return BatchGeometry(
        batch_size=args.per_device_train_batch_size,
        num_processes=args.world_size,
        num_chunks=args.steps_per_generation,
        num_generations=args.num_generations,
        num_iterations=args.num_iterations,
    )


def _new_policy(pipeline: Any, args: DiffusionGRPOConfig) -> Policy:
    set_seed(args.seed)
    policy = Policy(
        pipeline,
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        target_modules=args.lora_target_modules,
        guidance_scale=args.guidance_scale,
        max_sequence_length=args.max_sequence_length,
    )
    if args.gradient_checkpointing:
        policy.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        # Trainer would look for a method that diffusers models do not have.
        args.gradient_checkpointing = args.activation_checkpointing = False
    return policy


def _reward_set(reward_funcs: RewardFunction | Sequence[RewardFunction], args: DiffusionGRPOConfig) -> RewardSet:
    functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    settings = {
        "noise_level": args.reward_noise_level,
        "ensemble": args.reward_ensemble,
        "num_noise_samples": args.reward_num_noise_samples,
    }
    return RewardSet(functions, settings)


def _reduction(name: str) -> Any:
    return {"ratio/min": torch.min, "ratio/max": torch.max}.get(name, torch.mean)
