"""A run on so many GPUs: what a rank holds, what an iteration costs, hours, and what to change where it does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dina_reward.alignment.config import AlignmentConfig
from dina_reward.alignment.trainers.grpo_config import DiffusionGRPOConfig
from dina_reward.alignment.trainers.joint import JointTimestepsConfig
from dina_reward.alignment.trainers.nft import DiffusionNFTConfig
from dina_reward.planning.calls import Calls, calls_of
from dina_reward.planning.devices import RANKS_PER_NODE, Device, Rates
from dina_reward.planning.memory import (
    MOMENT_BYTES,
    RewardHome,
    Setup,
    Strategy,
    memory_parts,
    stored_bytes,
    total_bytes,
    trained_parameters,
)
from dina_reward.planning.sizes import RunSizes
from dina_reward.planning.traffic import Traffic, traffic_of


GIB = 2**30


@dataclass(frozen=True)
class Work:
    """FLOPs, or seconds, of an iteration.

    Args:
        rollout: denoiser calls without gradient.
        reward: scores.
        update: denoiser calls with gradient and their backward passes.
    """

    rollout: float
    reward: float
    update: float

    @property
    def total(self) -> float:
        """All three."""
        return self.rollout + self.reward + self.update


@dataclass(frozen=True)
class Plan:
    """What a configuration asks for on so many GPUs.

    Args:
        name: of the configuration.
        model: of the generator.
        sizes: of its parts.
        setup: what decides the memory of a rank.
        memory: bytes of a GPU.
        device: whose data sheet gives the links.
        rates: FLOP/s attained.
        calls: per sample.
        timesteps: that a sample is trained at and that may share a pass; 0 where its losses are not apart.
        together: how many of them do.
        samples: of an iteration, over all ranks.
        micro_batches: of one rank and iteration, in one pass over them.
        optimizer_steps: per iteration.
        iterations: of the run; ``None`` where the configuration does not say.
        flops: of an iteration, over all ranks.
        traffic: of one rank and iteration.
    """

    name: str
    model: str
    sizes: RunSizes
    setup: Setup
    memory: int
    device: Device
    rates: Rates
    calls: Calls
    timesteps: int
    together: int
    samples: int
    micro_batches: int
    optimizer_steps: float
    iterations: float | None
    flops: Work
    traffic: Traffic

    @property
    def needed(self) -> int:
        """Bytes that a rank needs."""
        return total_bytes(self.sizes, self.setup)

    @property
    def fits(self) -> bool:
        """Whether a GPU has them."""
        return self.needed <= self.memory

    @property
    def seconds(self) -> Work:
        """Of computing one iteration."""
        ranks, flops, rates = self.setup.gpus, self.flops, self.rates
        return Work(
            flops.rollout / rates.rollout / ranks,
            0.0 if self.setup.reward == "server" else flops.reward / rates.reward / ranks,
            flops.update / rates.update / ranks,
        )

    @property
    def transfer_seconds(self) -> float:
        """Of sending one iteration's bytes, none of it behind computation."""
        within = self.setup.gpus <= RANKS_PER_NODE
        between = self.traffic.total - self.traffic.server
        return (
            between / (self.device.link if within else self.device.network) + self.traffic.server / self.device.network
        )

    @property
    def iteration_seconds(self) -> float:
        """Computing, then sending."""
        return self.seconds.total + self.transfer_seconds

    @property
    def samples_per_second(self) -> float:
        """Over all ranks."""
        return self.samples / self.iteration_seconds

    @property
    def hours(self) -> float | None:
        """Of the whole run, without evaluations."""
        return None if self.iterations is None else self.iterations * self.iteration_seconds / 3600

    def to_dict(self) -> dict[str, Any]:
        """For JSON: numbers in bytes, FLOPs and seconds."""
        return {
            "name": self.name,
            "model": self.model,
            "setup": asdict(self.setup),
            "memory": self.memory,
            "parts": {part.name: part.bytes for part in memory_parts(self.sizes, self.setup)},
            "needed": self.needed,
            "fits": self.fits,
            "device": asdict(self.device),
            "rates": asdict(self.rates),
            "calls": asdict(self.calls),
            "timesteps_per_forward": self.together,
            "timesteps_per_forward_that_fit": joint_timesteps_that_fit(self),
            "samples": self.samples,
            "micro_batches": self.micro_batches,
            "optimizer_steps": self.optimizer_steps,
            "iterations": self.iterations,
            "flops": asdict(self.flops),
            "seconds": {**asdict(self.seconds), "transfer": self.transfer_seconds},
            "traffic": asdict(self.traffic),
            "samples_per_second": self.samples_per_second,
            "hours": self.hours,
            "changes": [] if self.fits else [change.to_dict() for change in changes_of(self)],
        }


def make_plan(
    name: str,
    model: str,
    sizes: RunSizes,
    config: AlignmentConfig,
    *,
    gpus: int,
    memory: int,
    device: Device,
    rates: Rates,
    weight_bytes: int = 2,
    reward: RewardHome = "shared",
    reward_functions: int = 1,
    strategy: Strategy = "ddp",
    guidance_passes: Any = None,
) -> Plan:
    """Puts a plan together; nothing is loaded.

    Args:
        name, model: for people.
        sizes: of the run's parts, see `sizes_of`.
        config: of the trainer, whose batch is spread over ``gpus``.
        gpus: ranks.
        memory: bytes of a GPU.
        device: whose links are counted with.
        rates: FLOP/s attained.
        weight_bytes: of a frozen weight.
        reward: where it lives; FSDP2 allows no shared weights.
        reward_functions: scores per sample.
        strategy: ``"ddp"`` or ``"fsdp2"``.
        guidance_passes: function of a guidance scale: denoiser passes of a call; by default two above 1.
    """
    calls = calls_of(config, guidance_passes or (lambda scale: 2 if scale > 1 else 1))
    batch = config.geometry(gpus)
    setup = _setup(sizes, config, calls, gpus, weight_bytes, reward, strategy)
    steps, levels = config.optimizer_steps_per_generation, len(config.reward_noise_level)
    iterations = config.max_steps / steps if config.max_steps > 0 else None
    assert sizes.card.step_flops is not None
    updates = batch.num_chunks * calls.gradient_passes
    return Plan(
        name=name,
        model=model,
        sizes=sizes,
        setup=setup,
        memory=memory,
        device=device,
        rates=rates,
        calls=calls,
        timesteps=config.trained_timesteps if isinstance(config, JointTimestepsConfig) else 0,
        together=config.joint_timesteps() if isinstance(config, JointTimestepsConfig) else 1,
        samples=batch.rows,
        micro_batches=batch.num_chunks,
        optimizer_steps=steps,
        iterations=iterations,
        flops=Work(
            rollout=batch.rows * calls.rollout * sizes.card.step_flops,
            reward=batch.rows * calls.reward * levels * config.reward_num_noise_samples * _reward_flops(sizes, calls),
            update=batch.rows * calls.update * sizes.card.step_flops * update_passes(setup),
        ),
        traffic=traffic_of(
            ranks=gpus,
            sharded=strategy == "fsdp2",
            trained=trained_parameters(sizes, setup),
            optimizer_steps=steps,
            denoiser_bytes=sizes.denoiser * (4 if setup.full else weight_bytes),
            passes=batch.num_chunks * calls.passes + updates,
            backward_passes=updates,
            samples=batch.rows,
            reward_functions=reward_functions,
            server_bytes=int(setup.samples * calls.reward * sizes.latent_elements * weight_bytes)
            if reward == "server"
            else 0,
        ),
    )


def update_passes(setup: Setup) -> int:
    """Forward passes that a call with gradient costs: itself, its backward pass, and the blocks' computing again.

    The backward pass of a LoRA costs about one forward pass (gradients of inputs), that of all weights two.
    """
    return 1 + (2 if setup.full else 1) + setup.checkpointing


def _reward_flops(sizes: RunSizes, calls: Calls) -> int:
    return sizes.reward_flops * (2 if calls.through_reward else 1)


def _text(value: Any) -> str:
    """An option of `transformers`, which is an enumeration or a string."""
    return str(getattr(value, "value", value))


def _setup(
    sizes: RunSizes,
    config: AlignmentConfig,
    calls: Calls,
    gpus: int,
    weight_bytes: int,
    reward: RewardHome,
    strategy: Strategy,
) -> Setup:
    batch = config.geometry(gpus)
    grpo = config if isinstance(config, DiffusionGRPOConfig) else None
    trained = 0 if grpo is None else grpo.sde_window_size or 0
    states = config.reward_num_noise_samples * len(config.reward_noise_level)
    copies = (config.ema_decay is not None, isinstance(config, DiffusionNFTConfig))
    return Setup(
        gpus=gpus,
        strategy=strategy,
        weight_bytes=weight_bytes,
        four_bit=config.load_in_4bit,
        full=config.train_full_model,
        checkpointing=bool(config.gradient_checkpointing),
        reward=reward,
        moment_bytes=MOMENT_BYTES.get(_text(config.optim), 8),
        averages=sum(copies) + (config.train_full_model and config.needs_reference),
        rows=batch.batch_size,
        graphs=calls.graphs,
        reward_rows=states if calls.through_reward and reward != "server" else 0,
        stored=stored_bytes(
            sizes.latent_elements,
            weight_bytes,
            trained,
            means=grpo is not None and grpo.loss_type == "grpo_guard",
            reference=grpo is not None and grpo.needs_reference,
        ),
        samples=batch.batch_size * batch.num_chunks,
        offload=config.offload_trajectories,
        eval_rows=0 if _text(config.eval_strategy) == "no" else config.per_device_eval_batch_size,
    )


@dataclass(frozen=True)
class Change:
    """Something to change, made after those before it.

    Args:
        text: what to write into the configuration or on the command line.
        needed: bytes of a rank afterwards.
        fits: whether they are there.
    """

    text: str
    needed: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"change": self.text, "needed": self.needed, "fits": self.fits}


def changes_of(plan: Plan) -> list[Change]:
    """What to change, the cheapest first and each on top of the others, until the run fits or nothing is left.

    What saves less than one hundredth of the memory is left out.
    """
    setup, found = plan.setup, list[Change]()
    needed = plan.needed
    for text, changed in _candidates(plan):
        fields = changed(setup)
        if fields is None:
            continue
        tried = replace(setup, **fields)
        after = total_bytes(plan.sizes, tried)
        if needed - after < plan.memory / 100:
            continue
        setup, needed = tried, after
        found.append(Change(text(tried) if callable(text) else text, needed, needed <= plan.memory))
        if needed <= plan.memory:
            break
    return found


def _candidates(plan: Plan) -> Iterator[tuple[Any, Any]]:
    yield "per_device_eval_batch_size: 1", lambda s: {"eval_rows": 1} if s.eval_rows > 1 else None
    yield "gradient_checkpointing: true", lambda s: None if s.checkpointing else {"checkpointing": True}
    yield (
        "share_backbone: true",
        lambda s: {"reward": "shared"} if s.reward == "own" and s.strategy == "ddp" and not s.full else None,
    )
    yield "offload_trajectories: true", lambda s: None if s.offload else {"offload": True}
    yield "optim: adamw_bnb_8bit", lambda s: {"moment_bytes": 2} if s.moment_bytes > 2 else None
    yield (
        lambda s: f"per_device_train_batch_size: {s.rows}, steps_per_generation and accumulation raised alike",
        lambda s: {"rows": _fitting_rows(plan, s)} if s.rows > 1 else None,
    )
    yield (
        "a reward on a server (reward_model_path: http://...)",
        lambda s: {"reward": "server", "reward_rows": 0} if s.reward == "own" and not s.reward_rows else None,
    )
    yield (
        "load_in_4bit: true (QLoRA)",
        lambda s: {"four_bit": True} if not s.four_bit and not s.full and s.strategy == "ddp" else None,
    )
    yield (
        "FSDP2 (accelerate/fsdp2.yaml), share_backbone: false, a reward on a server",
        lambda s: (
            {"strategy": "fsdp2", "four_bit": False, "reward": "server"}
            if s.gpus > 1 and s.strategy == "ddp" and not s.reward_rows
            else None
        ),
    )


def _fitting_rows(plan: Plan, setup: Setup) -> int:
    """The largest divisor of a micro-batch with which a rank fits; 1 where none does."""
    divisors = (rows for rows in range(setup.rows - 1, 0, -1) if setup.rows % rows == 0)
    fitting = (r for r in divisors if total_bytes(plan.sizes, replace(setup, rows=r)) <= plan.memory)
    return next(fitting, 1)


def joint_timesteps_that_fit(plan: Plan) -> int:
    """The most timesteps of a sample that can share a forward and a backward pass; 0 where none fits or can."""

    def fits(number: int) -> bool:
        graphs = plan.setup.graphs * number / plan.together
        return total_bytes(plan.sizes, replace(plan.setup, graphs=graphs)) <= plan.memory

    divisors = [number for number in range(1, plan.timesteps + 1) if plan.timesteps % number == 0]
    return max(filter(fits, divisors), default=0)


def spread_over(config: AlignmentConfig, processes: int, gpus: int) -> dict[str, int]:
    """Settings with which a batch for so many processes is spread over another number of GPUs.

    Samples and optimizer steps of an iteration stay as they are where micro-batches allow it; where the batch has fewer
    micro-batches than there are GPUs, each GPU gets one, and samples are added until groups are whole.

    Args:
        config: of the trainer.
        processes: that it is written for.
        gpus: that there are.
    """
    batch = config.geometry(processes)
    chunks = max(1, math.ceil(batch.num_chunks * processes / gpus))
    while (chunks * gpus * batch.batch_size) % batch.num_generations:
        chunks += 1
    steps = min(chunks * config.num_iterations, max(1, round(config.optimizer_steps_per_generation)))
    while (chunks * config.num_iterations) % steps:
        steps -= 1
    return {
        "steps_per_generation": chunks,
        "gradient_accumulation_steps": max(1, chunks * config.num_iterations // steps),
    }
