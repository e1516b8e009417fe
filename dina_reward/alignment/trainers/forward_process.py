"""Training on clean samples under fresh noise: the forward process, its random draws, and the trainers' common part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dina_reward.alignment.experience.maker import Experience, RolloutPlan
from dina_reward.alignment.policy import Policy
from dina_reward.alignment.sampling.ddim import PredictionType, split_prediction
from dina_reward.alignment.sampling.prompts import PromptDataset
from dina_reward.alignment.sampling.samplers import Sampler
from dina_reward.alignment.sampling.seeding import Stream, generator_from, noise_by_row
from dina_reward.alignment.sampling.solver import check_order
from dina_reward.alignment.trainers.base import AlignmentTrainer
from dina_reward.alignment.trainers.joint import JointTimestepsConfig
from dina_reward.checks.values import check_choice, check_int
from dina_reward.noise import LevelSampler, NoisePoint, NoiseProcess, expand_as, is_flow_matching
from dina_reward.noise.draws import fold_seed
from dina_reward.reward_functions import RewardFunction


ModelPrediction = Literal["velocity", "epsilon", "sample", "v_prediction"]
TrainLevels = Literal["sampler", "uniform", "logit_normal"]


@dataclass(frozen=True)
class ForwardProcess:
    """Noisy inputs and regression targets of a diffusion or flow-matching model, ``x = a x_0 + sigma eps``, in float32.

    | prediction | target | ``x_0 hat`` of an output ``m`` |
    |---|---|---|
    | ``velocity`` (flow, arXiv 2209.03003) | ``eps - x_0`` | ``x - sigma m`` |
    | ``epsilon`` (arXiv 2006.11239) | ``eps`` | ``(x - sigma m) / a`` |
    | ``sample`` | ``x_0`` | ``m`` |
    | ``v_prediction`` (arXiv 2202.00512) | ``a eps - sigma x_0`` | ``a x - sigma m`` |

    Examples:
        >>> process = ForwardProcess.of_policy(policy)
        >>> point = process.noise_process.snap([0.3, 0.8])
        >>> noisy = process.noisy(latents, noise, point)
        >>> loss = (predict(noisy, point.timestep) - process.target(latents, noise, point)).square().mean()

    Args:
        noise_process (`NoiseProcess`): of the model's training scheduler.
        prediction_type (`str`): what the model predicts.

    Raises:
        ValueError: unknown prediction type.
    """

    noise_process: NoiseProcess
    prediction_type: ModelPrediction

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, get_args(ModelPrediction))

    @classmethod
    def of_policy(cls, policy: Policy) -> ForwardProcess:
        """The process that a policy's pipeline was trained with, read from its scheduler's configuration."""
        config = policy.pipeline.scheduler.config
        prediction: Any = "velocity" if is_flow_matching(config) else config["prediction_type"]
        return cls(policy.family.noise_process(config), prediction)

    def noisy(self, latents: Tensor, noise: Tensor, point: NoisePoint) -> Tensor:
        """``a x_0 + sigma eps``, shape ``(batch, ...)``, float32.

        Args:
            latents (`Tensor`): clean latents, shape ``(batch, ...)``.
            noise (`Tensor`): standard normal, same shape.
            point (`NoisePoint`): levels and timesteps, shape ``(batch,)``.
        """
        return self.noise_process.add_noise(latents.float(), noise.float(), point.level)

    def target(self, latents: Tensor, noise: Tensor, point: NoisePoint) -> Tensor:
        """What a perfect model would predict for ``noisy(latents, noise, point)``, same shape, float32."""
        latents, noise = latents.float(), noise.float()
        if self.prediction_type == "velocity":
            return noise - latents
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        signal, level = self._coefficients(point, latents)
        return signal * noise - level * latents

    def predict_clean(self, noisy: Tensor, prediction: Tensor, point: NoisePoint) -> Tensor:
        """``x_0 hat`` of a model output, same shape, float32, differentiable."""
        signal, level = self._coefficients(point, noisy)
        if self.prediction_type == "velocity":
            return noisy.float() - level * prediction.float()
        kind: PredictionType = self.prediction_type
        return split_prediction(noisy, prediction, signal**2, kind)[0]

    def _coefficients(self, point: NoisePoint, target: Tensor) -> tuple[Tensor, Tensor]:
        level = point.level.to(target.device, torch.float32)
        return expand_as(self.noise_process.signal(level), target), expand_as(level, target)


class TrainingNoise:
    """Levels and noise that clean samples are trained with: functions of ``(seed, generation, iteration, position, key)``.

    They depend neither on the split of a batch nor on the rank. A key names a sample, or whatever shares one draw.

    Args:
        process: the noise process, whose grid drawn levels snap to.
        levels: a distribution of levels; or a sampler, whose own grid points are then taken in random order, each once
            before any comes again (the timesteps of the rollout, DiffusionNFT, arXiv 2509.16117).
        seed: of the run.
    """

    def __init__(self, process: NoiseProcess, levels: LevelSampler | Sampler, seed: int) -> None:
        self.process = process
        self.levels = levels
        self.seed = seed

    def points(self, generation: int, iteration: int, position: int, keys: Sequence[int]) -> NoisePoint:
        """Noise level and timestep of each key, on the CPU.

        Args:
            generation: number of the generation.
            iteration: pass over its samples.
            position: number of the loss within that pass.
            keys: one integer per row.
        """
        if isinstance(self.levels, Sampler):
            grid = len(self.levels)
            cycle, place = divmod(position, grid)
            streams = self._streams(generation, iteration, cycle, keys)
            index = torch.stack([torch.randperm(grid, generator=stream)[place] for stream in streams])
            return NoisePoint(self.levels.levels.cpu()[index].float(), self.levels.timesteps.cpu()[index].float())
        streams = self._streams(generation, iteration, position, keys)
        return self.process.snap(torch.cat([self.levels.sample(1, stream) for stream in streams]))

    def noise(
        self, generation: int, iteration: int, position: int, keys: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """Standard normal noise, shape ``(len(keys), *shape)``, float32, on the CPU; arguments as for `points`."""
        seeds = [fold_seed(self.seed, Stream.TRAIN_NOISE, generation, iteration, position, key) for key in keys]
        return noise_by_row(seeds, shape)

    def _streams(self, generation: int, iteration: int, number: int, keys: Sequence[int]) -> list[torch.Generator]:
        parts = (self.seed, Stream.TRAIN_TIMESTEP, generation, iteration, number)
        return [generator_from(*parts, key) for key in keys]


@dataclass
class ForwardProcessConfig(JointTimestepsConfig):
    """Settings of the trainers that learn from clean samples under fresh noise."""

    solver_order: int = field(
        default=1,
        metadata={
            "help": "Order of the rollout's steps: 1 (Euler, DDIM), or 2 (DPM-Solver++ 2M), which needs fewer of them. The "
            "evaluation samples at order 1, as the pipeline does."
        },
    )
    num_train_timesteps: int = field(
        default=4,
        metadata={"help": "Noise levels of each sample per pass over a generation batch. See timesteps_per_forward."},
    )
    train_level_distribution: TrainLevels = field(
        default="sampler",
        metadata={
            "help": "Levels of training: 'sampler' (those of the rollout, in random order), 'uniform' or 'logit_normal'."
        },
    )
    train_level_mean: float = field(default=0.0, metadata={"help": "Mean of the logit under 'logit_normal'."})
    train_level_std: float = field(
        default=1.0, metadata={"help": "Standard deviation of the logit under 'logit_normal'."}
    )

    @property
    def trained_timesteps(self) -> int:
        """`num_train_timesteps`."""
        return self.num_train_timesteps

    def _check_numbers(self) -> None:
        super()._check_numbers()
        check_int(self, "num_generations", 2)
        check_int(self, "num_train_timesteps", 1)
        check_int(self, "solver_order", 1)
        check_order(self.solver_order)
        check_choice("train_level_distribution", self.train_level_distribution, get_args(TrainLevels))
        self.level_sampler()

    def level_sampler(self) -> LevelSampler | None:
        """The distribution of training levels; None for the levels of the rollout."""
        if self.train_level_distribution == "sampler":
            return None
        return LevelSampler(self.train_level_distribution, mean=self.train_level_mean, std=self.train_level_std)


class ForwardProcessTrainer(AlignmentTrainer):
    """Base of the trainers that need clean samples only: any sampler will do, and no log-probability is taken.

    Each micro-batch is trained ``num_train_timesteps`` times, each at other levels and under other noise. See
    `AlignmentTrainer` for the arguments.
    """

    args: ForwardProcessConfig

    def __init__(
        self,
        pipeline: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: ForwardProcessConfig,
        train_dataset: PromptDataset,
        **kwargs: Any,
    ) -> None:
        super().__init__(pipeline, reward_funcs, args, train_dataset, **kwargs)
        self.forward_process = ForwardProcess.of_policy(self.policy)
        levels = self.args.level_sampler()
        self.training_noise = TrainingNoise(
            self.forward_process.noise_process, self.sampler if levels is None else levels, self.args.seed
        )
        self._iteration = 0

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """See `AlignmentTrainer.training_step`; each pass over a generation has noise of its own."""
        self._iteration = int(inputs["iteration"][0])
        return super().training_step(model, inputs, num_items_in_batch)

    def plan(self, generation: int) -> RolloutPlan:
        return RolloutPlan(solver_order=self.args.solver_order)

    def num_losses(self, experience: Experience) -> int:
        """One loss for the training levels that share a pass."""
        return self.args.num_train_timesteps // self.args.joint_timesteps()

    def draw(self, experience: Experience, positions: Sequence[int], keys: Sequence[int]) -> tuple[Tensor, NoisePoint]:
        """Noise, shape ``(len(positions) * len(keys), ...)``, and grid points of some losses, one after the other."""
        device, shape = self.accelerator.device, experience.rollout.latents.shape[1:]
        at = [(experience.generation, self._iteration, position, keys) for position in positions]
        points = [self.training_noise.points(*place) for place in at]
        noise = torch.cat([self.training_noise.noise(*place, shape) for place in at])
        level = torch.cat([point.level for point in points])
        timestep = torch.cat([point.timestep for point in points])
        return noise.to(device), NoisePoint(level.to(device), timestep.to(device))
