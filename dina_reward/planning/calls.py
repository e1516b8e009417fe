"""How many denoiser and reward calls a sample of an alignment run costs, by algorithm, as `CallCounter` counts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dina_reward.alignment.config import AlignmentConfig
from dina_reward.alignment.trainers.backprop import RewardBackpropConfig
from dina_reward.alignment.trainers.forward_process import ForwardProcessConfig
from dina_reward.alignment.trainers.grpo_config import DiffusionGRPOConfig
from dina_reward.alignment.trainers.nft import DiffusionNFTConfig
from dina_reward.alignment.trainers.online_dpo import OnlineDPOConfig
from dina_reward.search.distillation import SearchDistillationConfig


@dataclass(frozen=True)
class Calls:
    """Calls per sample of a generation batch, means where steps are drawn at random; see `CallCounter` for the units.

    Args:
        rollout: denoiser calls without gradient: sampling, references, old policies.
        update: denoiser calls with gradient.
        reward: states that are scored.
        graphs: denoiser calls per sample of a micro-batch whose graphs are held at once.
        passes, gradient_passes: forward passes of the denoiser per micro-batch, without and with gradient.
        through_reward: the gradient passes the reward as well.
    """

    rollout: float
    update: float
    reward: float
    graphs: float
    passes: float
    gradient_passes: float
    through_reward: bool = False


def calls_of(config: AlignmentConfig, evaluations: Callable[[float], int]) -> Calls:
    """Calls per sample that a configuration makes.

    Those of `SearchDistillationConfig` are its budget, with one reward call for each whole sample of it.

    Args:
        config: of an alignment trainer.
        evaluations: denoiser passes of one call at a guidance scale: 2 with classifier-free guidance, else 1.

    Raises:
        ValueError: the configuration of no trainer that is known here.
    """
    guided = evaluations(config.guidance_scale)
    if isinstance(config, RewardBackpropConfig):
        assert config.grad_guidance_scale is not None
        return _backprop(config, guided, evaluations(config.grad_guidance_scale))
    if isinstance(config, ForwardProcessConfig):
        return _forward_process(config, guided)
    if isinstance(config, DiffusionGRPOConfig):
        return _policy_gradient(config, guided)
    raise ValueError(f"no calls are known for {type(config).__name__}; plan a run of one of the alignment recipes")


def _policy_gradient(config: DiffusionGRPOConfig, guided: int) -> Calls:
    trained, together = config.trained_timesteps, config.joint_timesteps()
    passes = config.num_inference_steps + trained * config.needs_reference
    updates = trained * config.num_iterations
    kept = _kept_share(config)
    return Calls(
        rollout=guided * passes,
        update=guided * kept * updates,
        reward=1 + trained * (config.credit == "gain"),
        graphs=guided * kept * together,
        passes=passes,
        gradient_passes=updates / together,
    )


def _kept_share(config: AlignmentConfig) -> float:
    """Share of the samples that are trained on."""
    return 1.0 if config.keep_per_group is None else config.keep_per_group / config.num_generations


def _old_policy_share(config: DiffusionNFTConfig) -> float:
    """Share of losses that need the old policy: without decay it is the trained one until a generation's first step."""
    if config.old_policy_decay_rate and config.old_policy_decay_max:
        return 1.0
    return 1 - min(1.0, config.gradient_accumulation_steps / config.micro_steps_per_generation)


def _forward_process(config: ForwardProcessConfig, guided: int) -> Calls:
    sampled, scored, share, besides = float(config.num_inference_steps), 1.0, 1.0, 0.0
    if isinstance(config, DiffusionNFTConfig):
        share = _kept_share(config)
        besides = _old_policy_share(config) + config.needs_reference
    elif isinstance(config, OnlineDPOConfig):
        share, besides = 2 * config.num_pairs / config.num_generations, 1
    elif isinstance(config, SearchDistillationConfig):
        scored = config.search_budget / config.num_generations
        sampled *= scored
    updates, together = config.num_train_timesteps * config.num_iterations, config.joint_timesteps()
    return Calls(
        rollout=guided * (sampled + share * updates * besides),
        update=guided * share * updates,
        reward=scored,
        graphs=guided * share * together,
        passes=sampled + updates * besides / together,
        gradient_passes=updates / together,
    )


def _backprop(config: RewardBackpropConfig, guided: int, guided_gradient: int) -> Calls:
    assert config.grad_step_range is not None
    assert config.early_stop_range is not None
    reference = int(config.needs_reference)
    if config.method == "refl":
        plain, gradients, again = sum(config.grad_step_range) / 2 - 0.5, 1, 0
    elif config.method == "draft":
        plain, gradients = float(config.num_inference_steps - config.draft_k), config.draft_k
        again = (gradients - 1) * reference  # the penalty evaluates steps whose input has a graph once more
    else:
        gradients, again = config.num_grad_steps, 0
        plain = sum(config.early_stop_range) / 2 + 0.5 - gradients
    update = guided_gradient * (gradients + again)
    return Calls(
        rollout=guided * plain + guided_gradient * gradients * reference,
        update=update,
        reward=1.0,
        graphs=update,
        passes=plain + gradients * reference,
        gradient_passes=gradients + again,
        through_reward=True,
    )
