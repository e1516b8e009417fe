"""Bytes of one rank, part by part: weights, what is trained, rollouts, activations; under DDP, under FSDP2, in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dina_reward.planning.sizes import RunSizes


Strategy = Literal["ddp", "fsdp2"]
RewardHome = Literal["shared", "own", "server"]

FOUR_BIT_BYTES = 4.127 / 8
"""Of a weight in NF4 with quantised scales: 4 bits, an 8-bit scale per 64 of them, a float32 one per 256 scales."""

RESERVE = int(1.5 * 2**30)
"""What a CUDA context, workspaces of libraries and fragmentation take: assumed, not counted."""

MOMENT_BYTES = {"adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adamw_8bit": 2, "sgd": 0}
"""Bytes of optimizer state per trained parameter; 8 for all others (two float32 moments)."""


@dataclass(frozen=True)
class Setup:
    """What decides the memory of a rank, besides the sizes of the parts.

    Args:
        gpus: ranks.
        strategy: ``"ddp"`` or ``"fsdp2"``.
        weight_bytes: of a frozen weight.
        four_bit: the linear layers of the blocks are stored in 4 bits.
        full: the whole denoiser is trained, in float32.
        checkpointing: activations of blocks are computed again.
        reward: on the generator's weights (``"shared"``), on a copy in the rank (``"own"``), or elsewhere (``"server"``).
        moment_bytes: of the optimizer's state per trained parameter.
        averages: float32 copies of what is trained besides: moving average, old policy, initial weights.
        rows: samples of a micro-batch.
        graphs: denoiser calls per such sample whose graphs are held at once.
        reward_rows: rows of the reward whose graphs are held per such sample; 0 where no gradient passes it.
        stored: bytes of one sample's recorded rollout.
        samples: of a generation batch on one rank.
        offload: recorded rollouts are kept in host memory.
        eval_rows: samples that are decoded at once in evaluations; 0 without them.
    """

    gpus: int
    strategy: Strategy
    weight_bytes: int
    four_bit: bool
    full: bool
    checkpointing: bool
    reward: RewardHome
    moment_bytes: int
    averages: int
    rows: int
    graphs: float
    reward_rows: int
    stored: int
    samples: int
    offload: bool
    eval_rows: int


@dataclass(frozen=True)
class Part:
    """Some of a rank's memory.

    Args:
        name: of what.
        bytes: how much.
    """

    name: str
    bytes: int


def memory_parts(sizes: RunSizes, setup: Setup) -> tuple[Part, ...]:
    """Memory of one rank when it is fullest, part by part; `RESERVE` is the last."""
    trained, shards = trained_parameters(sizes, setup), _shards(setup)
    optimizer = trained * (4 + setup.moment_bytes + 4 * setup.averages) // shards
    buckets = 4 * trained if setup.strategy == "ddp" and setup.gpus > 1 else 0
    return (
        Part("denoiser", denoiser_bytes(sizes, setup)),
        Part("text encoders", sizes.text_encoders * setup.weight_bytes),
        Part("VAE", sizes.vae * setup.weight_bytes),
        Part("reward", reward_bytes(sizes, setup)),
        Part("trained weights", 0 if setup.full else 4 * trained // shards),
        Part("gradients, optimizer, averages", optimizer),
        Part("buckets of DDP", buckets),
        Part("stored rollouts", 0 if setup.offload else setup.stored * setup.samples),
        Part("activations", activation_bytes(sizes, setup)),
        Part("context and workspaces", RESERVE),
    )


def total_bytes(sizes: RunSizes, setup: Setup) -> int:
    """Sum of `memory_parts`."""
    return sum(part.bytes for part in memory_parts(sizes, setup))


def trained_parameters(sizes: RunSizes, setup: Setup) -> int:
    """Of the whole denoiser, or of the policy's LoRA."""
    return sizes.denoiser if setup.full else sizes.policy_lora


def denoiser_bytes(sizes: RunSizes, setup: Setup) -> int:
    """The generator's weights on one rank, with what FSDP2 gathers while it runs: two blocks and all outside of blocks."""
    size = 4 if setup.full else setup.weight_bytes
    if setup.four_bit:
        # accelerate leaves 4-bit weights whole on every rank.
        dense = sizes.denoiser - sizes.block_weights
        return int(size * dense + FOUR_BIT_BYTES * sizes.block_weights)
    if _shards(setup) == 1:
        return size * sizes.denoiser
    return size * (sizes.denoiser // setup.gpus + 2 * sizes.largest_block + sizes.outside_blocks)


def reward_bytes(sizes: RunSizes, setup: Setup) -> int:
    """LoRA and head in float32, and the weights of the blocks that run unless they are the generator's."""
    if setup.reward == "server":
        return 0
    own = setup.weight_bytes * sizes.card.backbone_parameters if setup.reward == "own" else 0
    return own + 4 * sizes.reward_trained


def activation_bytes(sizes: RunSizes, setup: Setup) -> int:
    """The larger of what an update keeps for its backward pass and what an evaluation decodes at once."""
    update = sizes.denoiser_kept.bytes(setup.rows * setup.graphs, setup.checkpointing)
    if setup.reward_rows:
        update += sizes.reward_kept.bytes(setup.rows * setup.reward_rows, False)
    return max(update, setup.eval_rows * sizes.decode_bytes)


def stored_bytes(latent_elements: int, weight_bytes: int, trained: int, *, means: bool, reference: bool) -> int:
    """Of one sample's recorded rollout: states around the trained steps, the final latent, and float32 predictions.

    Args:
        latent_elements: of one latent.
        weight_bytes: of the storage dtype.
        trained: recorded steps, neighbours of each other.
        means: means of the transitions are recorded.
        reference: predictions of the reference are.
    """
    states = trained + 2 if trained else 1
    return latent_elements * (weight_bytes * states + 4 * trained * (int(means) + int(reference)))


def _shards(setup: Setup) -> int:
    return setup.gpus if setup.strategy == "fsdp2" else 1
