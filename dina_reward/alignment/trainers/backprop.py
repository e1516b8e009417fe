"""Reward back-propagation: the reward of a predicted clean latent is differentiated through the last sampler steps.

    loss = -mean r(x_0 hat) + beta mean |v - v_ref|^2

ReFL (arXiv 2304.05977), DRaFT-K (arXiv 2309.17400) and DRTune (arXiv 2405.00760) differ in where gradient flows; see
`GradientPlan`. With a reward on latents nothing is decoded, so no graph through a VAE is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from dina_reward.alignment.config import AlignmentConfig
from dina_reward.alignment.experience.rewards import differentiable_score
from dina_reward.alignment.objectives.policy_gradient import ObjectiveOutput
from dina_reward.alignment.sampling.prompts import PromptDataset
from dina_reward.alignment.sampling.rollout import PredictFunction
from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.alignment.sampling.seeding import Stream, generator_from
from dina_reward.alignment.trainers.base import AlignmentTrainer
from dina_reward.checks.values import check_choice, check_int, check_real, is_int
from dina_reward.families import Conditioning
from dina_reward.reward_functions import RewardFunction, callable_name, reward_list, takes_images


BackpropMethod = Literal["refl", "draft", "drtune"]
RewardLoss = Literal["linear", "hinge"]


@dataclass(frozen=True)
class GradientPlan:
    """Where gradient flows in one deterministic rollout, the same for all its rows.

    | method | gradient steps | scored |
    |---|---|---|
    | ReFL | one random late step | its ``x_0`` prediction |
    | DRaFT-K | the last ``K`` steps, through their inputs too | ``x_0`` prediction of the last step |
    | DRTune | steps spread over the rollout, their inputs held constant | ``x_0`` prediction of a random late step |

    Args:
        steps (`tuple[int, ...]`): steps whose prediction is differentiated, increasing.
        stop (`int`): step whose ``x_0`` prediction is scored; later ones are not taken.
        detach_input (`bool`): the model sees its input as a constant; gradient still passes the sampler's own arithmetic.
    """

    steps: tuple[int, ...]
    stop: int
    detach_input: bool = False


def refl_plan(seed: int, generation: int, step_range: Sequence[int]) -> GradientPlan:
    """ReFL: one step drawn uniformly from ``[low, high)``, a function of ``(seed, generation)``."""
    step = _draw(generator_from(seed, Stream.TRAIN_TIMESTEP, generation), *step_range)
    return GradientPlan((step,), stop=step)


def draft_plan(num_inference_steps: int, last: int) -> GradientPlan:
    """DRaFT-K: the ``last`` of all steps."""
    return GradientPlan(tuple(range(num_inference_steps - last, num_inference_steps)), stop=num_inference_steps - 1)


def drtune_plan(seed: int, generation: int, num_grad_steps: int, stop_range: Sequence[int]) -> GradientPlan:
    """DRTune: stops at a step drawn from ``[low, high)``; evenly spaced steps up to it, from a random one on."""
    generator = generator_from(seed, Stream.TRAIN_TIMESTEP, generation)
    stop = _draw(generator, *stop_range)
    stride = (stop + 1) // num_grad_steps
    offset = _draw(generator, 0, stop + 1 - stride * (num_grad_steps - 1))
    return GradientPlan(tuple(offset + stride * i for i in range(num_grad_steps)), stop=stop, detach_input=True)


def _draw(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


@dataclass(frozen=True)
class CleanSample:
    """End of a rollout with gradient.

    Args:
        latents (`Tensor`): ``x_0`` prediction of the step where the rollout stopped, shape ``(batch, ...)``, with a graph.
        penalty (`Tensor`, *optional*): ``mean |v - v_ref|^2`` over gradient steps and latent elements, shape ``(batch,)``.
    """

    latents: Tensor
    penalty: Tensor | None = None


def sample_with_gradient(
    predict: PredictFunction,
    initial_latents: Tensor,
    sampler: Sampler,
    plan: GradientPlan,
    *,
    trained_predict: PredictFunction | None = None,
    reference_predict: PredictFunction | None = None,
) -> CleanSample:
    """Denoises deterministically up to ``plan.stop``; only the predictions of ``plan.steps`` have a graph.

    Between steps latents are rounded to the dtype of ``initial_latents``, as in rollouts.

    Args:
        predict: the policy, for the steps without gradient.
        initial_latents: standard normal, shape ``(batch, ...)``.
        sampler: with timesteps on the device of the latents.
        plan: where gradient flows.
        trained_predict: the policy for the steps with gradient (wrapped for training, other guidance); ``predict`` by
            default.
        reference_predict: the model that `CleanSample.penalty` measures the distance to. The visited states count as
            constants in the penalty.
    """
    trained_predict = predict if trained_predict is None else trained_predict
    latents, penalties = initial_latents, []
    for index in range(plan.stop + 1):
        timestep = sampler.timesteps[index].expand(latents.shape[0])
        if index in plan.steps:
            seen = latents.detach() if plan.detach_input else latents
            prediction = trained_predict(seen, timestep)
            if reference_predict is not None:
                # One more pass where the input has a graph, which the penalty must not use.
                own = trained_predict(seen.detach(), timestep) if seen.requires_grad else prediction
                with torch.no_grad():
                    target = reference_predict(seen.detach(), timestep)
                penalties.append(((own - target) ** 2).flatten(start_dim=1).mean(dim=1))
        else:
            with torch.no_grad():
                prediction = predict(latents.detach(), timestep)
        if index < plan.stop:
            latents = sampler.step(index, latents, prediction).to(initial_latents.dtype)
    clean = sampler.predict_clean(plan.stop, latents, prediction)
    return CleanSample(clean, torch.stack(penalties).mean(dim=0) if penalties else None)


def reward_loss(rewards: Tensor, loss_type: RewardLoss, margin: float = 0.0) -> Tensor:
    """``-mean r`` (``"linear"``) or ``mean max(margin - r, 0)`` (``"hinge"``, which ignores rows that are good enough).

    Args:
        rewards: shape ``(batch,)``.
        loss_type: which.
        margin: reward from which on the hinge is 0.
    """
    return -rewards.mean() if loss_type == "linear" else (margin - rewards).clamp(min=0).mean()


@dataclass
class RewardBackpropConfig(AlignmentConfig):
    """Settings of reward back-propagation: ReFL, DRaFT-K and DRTune.

    Sampling is deterministic, so `sde_type` and `eta` are not read, and samples are not compared, so groups matter only
    for the noise they may share.
    """

    samples_ahead: ClassVar[bool] = False  # gradients reach the LoRA through the samples
    trains_on_rows: ClassVar[bool] = False

    learning_rate: float = field(default=1e-4, metadata={"help": "Initial learning rate of the optimizer."})
    num_generations: int = field(default=1, metadata={"help": "Samples per prompt."})
    steps_per_generation: int | None = field(
        default=1, metadata={"help": "Micro-batches that share a draw of gradient steps."}
    )
    method: BackpropMethod = field(default="refl", metadata={"help": "'refl', 'draft' or 'drtune'."})
    grad_step_range: list[int] | None = field(
        default=None,
        metadata={"help": "refl: steps [low, high) that the gradient step is drawn from. Default: the last quarter."},
    )
    draft_k: int = field(
        default=1,
        metadata={"help": "draft: gradient flows through so many last steps; num_inference_steps for all of them."},
    )
    num_grad_steps: int = field(default=2, metadata={"help": "drtune: steps whose prediction is differentiated."})
    early_stop_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "drtune: steps [low, high) that the step whose x0 prediction is scored is drawn from. Default: the last "
            "quarter."
        },
    )
    grad_guidance_scale: float | None = field(
        default=None, metadata={"help": "Classifier-free guidance at the gradient steps. Default: guidance_scale."}
    )
    loss_type: RewardLoss = field(
        default="linear", metadata={"help": "'linear': minus the reward; 'hinge': max(margin - reward, 0)."}
    )
    margin: float = field(
        default=0.0, metadata={"help": "hinge: reward from which on a sample is not trained further."}
    )
    beta: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the mean squared distance to the predictions of the initial model at gradient steps. "
            "0 builds no reference."
        },
    )

    def _fill_defaults(self) -> None:
        super()._fill_defaults()
        check_int(self, "num_inference_steps", 2)
        last_quarter = [self.num_inference_steps - max(1, self.num_inference_steps // 4), self.num_inference_steps]
        self.grad_step_range = last_quarter if self.grad_step_range is None else self.grad_step_range
        self.early_stop_range = last_quarter if self.early_stop_range is None else self.early_stop_range
        if self.grad_guidance_scale is None:
            self.grad_guidance_scale = self.guidance_scale

    def _check_numbers(self) -> None:
        super()._check_numbers()
        check_choice("method", self.method, get_args(BackpropMethod))
        check_choice("loss_type", self.loss_type, get_args(RewardLoss))
        check_int(self, "draft_k", 1)
        check_int(self, "num_grad_steps", 1)
        check_real(self, "grad_guidance_scale", 0.0, math.inf)
        check_real(self, "margin", -math.inf, math.inf)
        check_real(self, "beta", 0.0, math.inf)
        _check_step_range("grad_step_range", self.grad_step_range, self.num_inference_steps)
        _check_step_range("early_stop_range", self.early_stop_range, self.num_inference_steps)
        self._check_plan()
        if self.num_iterations != 1:
            raise ValueError(
                f"num_iterations must be 1, got {self.num_iterations}: every loss draws its own samples; train longer"
            )

    def _check_plan(self) -> None:
        if self.draft_k > self.num_inference_steps:
            raise ValueError(
                f"draft_k is {self.draft_k}, but a rollout has {self.num_inference_steps} steps (num_inference_steps)"
            )
        assert self.early_stop_range is not None
        if self.method == "drtune" and self.num_grad_steps > self.early_stop_range[0] + 1:
            raise ValueError(
                f"num_grad_steps is {self.num_grad_steps}, but a rollout that stops at step {self.early_stop_range[0]} has "
                f"only {self.early_stop_range[0] + 1}; lower it or raise early_stop_range"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss evaluates the model as it was before training."""
        return self.beta > 0

    def plan(self, generation: int) -> GradientPlan:
        """Where gradient flows in the rollouts of a generation."""
        assert self.grad_step_range is not None
        assert self.early_stop_range is not None
        if self.method == "refl":
            return refl_plan(self.seed, generation, self.grad_step_range)
        if self.method == "draft":
            return draft_plan(self.num_inference_steps, self.draft_k)
        return drtune_plan(self.seed, generation, self.num_grad_steps, self.early_stop_range)


@dataclass(frozen=True)
class PromptBatch:
    """One micro-batch of one rank before it is sampled.

    Args:
        generation (`int`): which one.
        rows (`list[int]`): row numbers in the generation batch.
        prompt_rows (`list[dict]`): dataset row of each.
        conditioning (`Conditioning`): encoded prompts, one row per sample.
    """

    generation: int
    rows: list[int]
    prompt_rows: list[dict[str, Any]]
    conditioning: Conditioning


class RewardBackpropTrainer(AlignmentTrainer):
    """Trains a pipeline by back-propagating a differentiable reward of its latents (ReFL, DRaFT-K, DRTune).

    Each micro-batch is sampled when its turn comes, with gradient where the method wants it. Reward functions take
    ``latents`` and return a tensor with a graph; a `LatentReward` fits as it is. Their own parameters get no gradient.
    See `AlignmentTrainer` for the arguments.

    Examples:
        >>> trainer = RewardBackpropTrainer(pipe, reward, RewardBackpropConfig("out"), train_dataset=["a cat", "a dog"])
        >>> trainer.train()

    Raises:
        ValueError: a reward function takes images, or (when the first batch is scored) is not differentiable.
    """

    args: RewardBackpropConfig

    def __init__(
        self,
        pipeline: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: RewardBackpropConfig,
        train_dataset: PromptDataset,
        **kwargs: Any,
    ) -> None:
        functions = reward_list(reward_funcs, "reward_funcs")
        for function in functions:
            if takes_images(function):
                raise ValueError(
                    f"{callable_name(function)} takes images, but reward back-propagation stays in latent space; give a "
                    "reward on `latents`, or align with DiffusionGRPOTrainer, which needs no gradient of the reward"
                )
        super().__init__(pipeline, functions, args, train_dataset, **kwargs)
        assert args.grad_guidance_scale is not None
        self._negative_scale = max(args.guidance_scale, args.grad_guidance_scale)

    def num_losses(self, experience: Any) -> int:
        """One."""
        return 1

    def step_loss(self, model: nn.Module, experience: Any, position: int) -> ObjectiveOutput:
        """Samples and scores a micro-batch, a `PromptBatch`: minus its reward, plus the penalty if there is one."""
        args, maker, batch = self.args, self.experience_maker, experience
        plan = args.plan(batch.generation)
        sample = sample_with_gradient(
            self._bind(batch, args.guidance_scale),
            maker.initial_latents(batch.generation, batch.rows),
            self.sampler,
            plan,
            trained_predict=self._bind(batch, args.grad_guidance_scale, model),
            reference_predict=self._reference(batch) if args.needs_reference else None,
        )
        # A leaf of its own keeps gradients away from the reward's parameters and frees its graph before the denoiser's.
        clean = sample.latents.detach().requires_grad_()
        scores = self._score(batch, clean)
        rewards = scores @ scores.new_tensor(self.reward_weights)
        value = reward_loss(rewards, args.loss_type, args.margin)
        (gradient,) = torch.autograd.grad(value, clean)
        loss = value.detach() + ((sample.latents - clean.detach()) * gradient).sum()
        metrics = self._metrics_of(scores.detach(), rewards.detach(), plan)
        if sample.penalty is not None:
            penalty = sample.penalty.mean()
            loss, metrics["kl"] = loss + args.beta * self.tightness * penalty, penalty.detach()
        return ObjectiveOutput(loss, metrics)

    def _experience_of(self, inputs: dict[str, Tensor]) -> Any:
        generation, rows = int(inputs["generation"][0]), inputs["row"].tolist()
        conditioning, prompt_rows, prompt_index = self.experience_maker.encode(generation, rows)
        return PromptBatch(generation, rows, prompt_rows, conditioning[prompt_index])

    def _bind(
        self, batch: PromptBatch, guidance_scale: float | None, model: nn.Module | None = None
    ) -> PredictFunction:
        negative = self.policy.encode_negative(self.accelerator.device, guidance_scale)
        return self.policy.bind(batch.conditioning, negative, model, guidance_scale)

    def _reference(self, batch: PromptBatch) -> Callable[[Tensor, Tensor], Tensor]:
        predict = self._bind(batch, self.args.grad_guidance_scale)

        def reference(latents: Tensor, timestep: Tensor) -> Tensor:
            with self.policy.reference():
                return predict(latents, timestep)

        return reference

    def _score(self, batch: PromptBatch, clean: Tensor) -> Tensor:
        """Scores, shape ``(batch, functions)``, float32, with a graph to ``clean``."""
        maker, count = self.experience_maker, len(batch.rows)
        self.policy.calls.count_rewards(count)
        seeds = maker.reward_seeds(batch.generation, batch.rows)
        available = self.rewards.arguments(clean, batch.prompt_rows, batch.conditioning, seeds)
        functions = self.rewards.functions
        return torch.stack([differentiable_score(function, available, count) for function in functions], dim=1)

    def _metrics_of(self, scores: Tensor, rewards: Tensor, plan: GradientPlan) -> dict[str, Tensor]:
        metrics = {
            "reward": rewards.mean(),
            "reward_std": rewards.std(unbiased=False),
            "grad_step": rewards.new_tensor(float(plan.steps[0])),
            "scored_step": rewards.new_tensor(float(plan.stop)),
        }
        if len(self.rewards.names) > 1:
            for name, column in zip(self.rewards.names, scores.unbind(dim=1), strict=True):
                metrics |= {f"rewards/{name}/mean": column.mean(), f"rewards/{name}/std": column.std(unbiased=False)}
        return metrics


def _check_step_range(name: str, value: object, num_inference_steps: int) -> None:
    if not (isinstance(value, (list, tuple)) and len(value) == 2 and all(is_int(step) for step in value)):
        raise ValueError(f"{name} must be two integers [low, high), got {value!r}")
    if not 0 <= value[0] < value[1] <= num_inference_steps:
        raise ValueError(
            f"{name} [{value[0]}, {value[1]}) must be a non-empty part of the steps [0, {num_inference_steps})"
        )
