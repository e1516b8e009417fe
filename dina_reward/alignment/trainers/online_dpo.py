"""Diffusion-DPO: pairs out of sampled groups, ranked by the reward, or out of a dataset, train the policy directly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dina_reward.alignment.experience.given_pairs import GIVEN_VARIANCE, given_experience, has_pairs
from dina_reward.alignment.experience.maker import Experience
from dina_reward.alignment.objectives.policy_gradient import ObjectiveOutput
from dina_reward.alignment.sampling.prompts import PromptDataset
from dina_reward.alignment.sampling.rollout import PredictFunction
from dina_reward.alignment.trainers.forward_process import ForwardProcessConfig, ForwardProcessTrainer
from dina_reward.checks.values import check_choice, check_int, check_real
from dina_reward.likelihood import ThurstoneModel, thurstone_preference
from dina_reward.noise import NoisePoint
from dina_reward.reward_functions import RewardFunction


DPOLossType = Literal["sigmoid", "ipo", "soft"]


@dataclass
class OnlineDPOConfig(ForwardProcessConfig):
    """Settings of online Diffusion-DPO (arXiv 2311.12908)."""

    trains_on_rows: ClassVar[bool] = False  # pairs are the best and the worst already, see num_pairs

    loss_type: DPOLossType = field(
        default="sigmoid",
        metadata={
            "help": "'sigmoid', 'ipo', or 'soft': sigmoid with the Thurstone probability of the reward difference as label."
        },
    )
    beta_dpo: float = field(
        default=2000.0,
        metadata={
            "help": "Strength of the implied KL to the reference. Errors are means over elements, so it is large."
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of labels taken to be wrong (cDPO), in [0, 0.5)."}
    )
    num_pairs: int = field(
        default=1, metadata={"help": "Pairs per group: the k best against the k worst, in opposite order."}
    )
    min_margin: float = field(
        default=0.0, metadata={"help": "Skip pairs whose rewards differ by less than this many stds of their group."}
    )
    preference_variance: float | None = field(
        default=None,
        metadata={
            "help": "With 'soft': variance of one reward in the Thurstone probability. Default: that of the "
            "noise-calibrated likelihood at reward_noise_level."
        },
    )

    @property
    def needs_reference(self) -> bool:
        """Whether the loss evaluates the model as it was before training."""
        return True

    def soft_label_variance(self) -> float:
        """Variance of one reward that soft labels assume."""
        if self.preference_variance is not None:
            return self.preference_variance
        return float(ThurstoneModel().variance(torch.tensor(self.reward_noise_level)).mean())

    def _check_numbers(self) -> None:
        super()._check_numbers()
        check_choice("loss_type", self.loss_type, get_args(DPOLossType))
        check_real(self, "beta_dpo", 1e-6, float("inf"))
        check_real(self, "label_smoothing", 0.0, 0.4999)
        check_real(self, "min_margin", 0.0, float("inf"))
        check_int(self, "num_pairs", 1)
        if self.preference_variance is not None:
            check_real(self, "preference_variance", 0.0, float("inf"))
        if 2 * self.num_pairs > self.num_generations:
            raise ValueError(
                f"num_pairs {self.num_pairs} needs groups of at least {2 * self.num_pairs}, but num_generations is "
                f"{self.num_generations}; set num_pairs to at most {self.num_generations // 2}"
            )
        if self.label_smoothing and self.loss_type == "ipo":
            raise ValueError("label_smoothing is not defined for loss_type 'ipo'; use 'sigmoid' or set it to 0")

    def _check_geometry(self) -> None:
        rows, group = self.per_device_train_batch_size, self.num_generations
        if rows % group:
            fitting = [str(number) for number in (rows // group * group, -(-rows // group) * group) if number]
            divisors = [str(size) for size in range(2, rows + 1) if rows % size == 0]
            raise ValueError(
                f"per_device_train_batch_size {rows} is not a multiple of num_generations {group}, so groups would be split "
                "and pairs could not be formed on one rank. Set per_device_train_batch_size to "
                f"{' or '.join(fitting)}, or num_generations to {' or '.join(divisors) or rows}"
            )
        super()._check_geometry()


class OnlineDPOTrainer(ForwardProcessTrainer):
    """Online Diffusion-DPO (arXiv 2311.12908; for flow matching Flow-DPO, arXiv 2501.13918).

    The policy samples groups, the reward ranks them, and the best of each group are preferred to its worst. Both sides of a
    pair see the same level and noise. The reference is the model before training. See `AlignmentTrainer` for the arguments.

    A dataset whose rows are pairs (``prompt``; clean latents of one sample, ``chosen`` and ``rejected``; optionally
    ``p_chosen``, the probability that the chosen side is the better one, and ``weight``) is trained on as it is:
    Diffusion-DPO on given preferences. Nothing is sampled then, and the reward is asked in evaluations alone; pairs that
    `search` leaves behind and a `LatentPreferenceDataset` are such. It takes groups of two. Where ``p_chosen`` is below one
    half, the sides change places.

    Examples:
        >>> args = OnlineDPOConfig("out", num_generations=8, per_device_train_batch_size=16, num_pairs=2)
        >>> trainer = OnlineDPOTrainer(pipe, reward, args, train_dataset=["a cat", "a dog"])
        >>> trainer.train()

        >>> from dina_reward.search import search
        >>> found = search(pipe, reward, ["a cat", "a dog"], method="best_of_n", budget=8, return_pairs=True)
        >>> rows = [pair.training_row() for pair in found.pairs]  # a train_dataset for the following settings
        >>> args = OnlineDPOConfig("out", num_generations=2, per_device_train_batch_size=16, loss_type="soft")

    Raises:
        ValueError: rows with one side of a pair, or with pairs where ``num_generations`` is not 2.
    """

    args: OnlineDPOConfig

    def __init__(
        self,
        pipeline: Any,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: OnlineDPOConfig,
        train_dataset: PromptDataset,
        **kwargs: Any,
    ) -> None:
        super().__init__(pipeline, reward_funcs, args, train_dataset, **kwargs)
        self.pairs_are_given = has_pairs(list(self.experience_maker.prompts.dataset[0]))
        if self.pairs_are_given and args.num_generations != 2:
            raise ValueError(
                f"train_dataset has pairs, which are groups of two, and num_generations is {args.num_generations}; set it "
                "to 2, or drop the columns 'chosen' and 'rejected' to have groups sampled"
            )

    def make_experience(self, generation: int) -> tuple[list[Experience], dict[str, float]]:
        """Groups that are sampled and ranked, or the pairs of the dataset."""
        if self.pairs_are_given:
            return given_experience(self.experience_maker, generation)
        return super().make_experience(generation)

    def step_loss(self, model: nn.Module, experience: Experience, position: int) -> ObjectiveOutput:
        """`dpo_loss` of the pairs of one micro-batch at the draws of levels and noise of a pass."""
        args, positions = self.args, self.args.joint_positions(position)
        pairs = form_pairs(
            experience.rewards, args.num_generations, num_pairs=args.num_pairs, min_margin=args.min_margin
        )
        first_pair = experience.rows[0] // args.num_generations * args.num_pairs
        keys = range(first_pair, first_pair + len(pairs.chosen))
        noise, point = self.draw(experience, positions, keys)
        pairs = pairs.repeated(len(positions))
        rows = torch.cat([pairs.chosen, pairs.rejected])
        latents = experience.rollout.latents.to(self.accelerator.device)[rows]
        noise = torch.cat([noise, noise])
        point = NoisePoint(torch.cat([point.level] * 2), torch.cat([point.timestep] * 2))
        conditioning = experience.conditioning_rows()[rows]

        def errors(predict: PredictFunction) -> Sequence[Tensor]:
            noisy = self.forward_process.noisy(latents, noise, point).to(self.policy.storage_dtype)
            target = self.forward_process.target(latents, noise, point)
            squares = (predict(noisy, point.timestep) - target) ** 2
            return squares.flatten(start_dim=1).mean(dim=1).chunk(2)

        # First, because turning the adapter off and on again must not touch a graph that is still needed.
        with torch.no_grad(), self.policy.reference():
            reference = errors(self.policy.bind(conditioning, experience.negative))
        chosen, rejected = errors(self.policy.bind(conditioning, experience.negative, model))
        output = dpo_loss(
            chosen,
            rejected,
            reference[0],
            reference[1],
            weights=experience.weights[pairs.chosen] * pairs.kept,
            labels=self._labels(experience, pairs),
            beta_dpo=args.beta_dpo * self.tightness,
            loss_type="ipo" if args.loss_type == "ipo" else "sigmoid",
        )
        skipped = 1 - pairs.kept.mean()
        return ObjectiveOutput(output.loss, {**output.metrics, "dpo/skipped_pairs": skipped})

    def _labels(self, experience: Experience, pairs: PreferencePairs) -> Tensor:
        labels = torch.ones_like(pairs.kept)
        if self.args.loss_type == "soft":
            margin = experience.rewards[pairs.chosen] - experience.rewards[pairs.rejected]
            assumed = GIVEN_VARIANCE if self.pairs_are_given else self.args.soft_label_variance()
            variance = torch.tensor(assumed, device=margin.device)
            labels = thurstone_preference(margin.nan_to_num(0.0), variance)
        smoothing = self.args.label_smoothing
        return (1 - smoothing) * labels + smoothing * (1 - labels)


@dataclass(frozen=True)
class PreferencePairs:
    """Pairs of rows of a micro-batch; those that are not kept count nothing in the loss.

    Args:
        chosen, rejected (`Tensor`): row numbers inside the micro-batch, shape ``(pairs,)``, int64.
        kept (`Tensor`): 1 or 0, shape ``(pairs,)``, float32.
    """

    chosen: Tensor
    rejected: Tensor
    kept: Tensor

    def repeated(self, times: int) -> PreferencePairs:
        """All pairs so many times, one after the other."""
        return PreferencePairs(self.chosen.repeat(times), self.rejected.repeat(times), self.kept.repeat(times))


def form_pairs(
    rewards: Tensor, num_generations: int, *, num_pairs: int = 1, min_margin: float = 0.0
) -> PreferencePairs:
    """The best against the worst of each group, the second best against the second worst, and so on.

    A pair is kept if its rewards differ, by at least ``min_margin`` standard deviations of the group, and if neither of
    its rows is part of another pair. Rows without a reward (NaN) are in no kept pair.

    Args:
        rewards (`Tensor`): shape ``(rows,)``; members of a group are neighbours.
        num_generations: rows per group.
        num_pairs: pairs per group.
        min_margin: see above.

    Raises:
        ValueError: groups are not whole, or too small for so many pairs.
    """
    if rewards.ndim != 1 or len(rewards) % num_generations or 2 * num_pairs > num_generations:
        raise ValueError(
            f"{num_pairs} pairs per group of {num_generations} cannot be formed from rewards of shape "
            f"{tuple(rewards.shape)}; expected whole groups of at least {2 * num_pairs} rows"
        )
    groups = rewards.float().view(-1, num_generations)
    valid = ~groups.isnan()
    best = groups.where(valid, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :num_pairs]
    worst = groups.where(valid, torch.inf).argsort(dim=1, stable=True)[:, :num_pairs]
    margins = groups.gather(1, best) - groups.gather(1, worst)
    counts = valid.sum(dim=1, keepdim=True)
    mean = groups.where(valid, 0.0).sum(dim=1, keepdim=True) / counts.clamp(min=1)
    squares = ((groups - mean) ** 2).where(valid, 0.0).sum(dim=1, keepdim=True)
    std = (squares / (counts - 1).clamp(min=1)).sqrt()
    # Where missing rewards leave too few rows, pairs cross over, so that their margin is not positive.
    kept = (margins > 0) & (margins >= min_margin * std)
    offset = torch.arange(0, len(rewards), num_generations, device=rewards.device)[:, None]
    return PreferencePairs((best + offset).flatten(), (worst + offset).flatten(), kept.flatten().float())


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    weights: Tensor,
    labels: Tensor | float = 1.0,
    beta_dpo: float = 2000.0,
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid",
) -> ObjectiveOutput:
    """Diffusion-DPO (arXiv 2311.12908) of pairs, as functions of the margin of the implicit reward.

    ``h = -[(err_w - err_w_ref) - (err_l - err_l_ref)] / 2``, and the loss is the mean over all pairs of weight times

    | type | loss of a pair |
    |---|---|
    | ``sigmoid`` | ``-q log sigmoid(beta h) - (1 - q) log sigmoid(-beta h)``; ``q = 1`` is the published loss |
    | ``ipo`` | ``(beta h - 1/2)^2``, ``beta^2`` times the loss of arXiv 2310.12036 |

    Args:
        chosen, rejected, reference_chosen, reference_rejected (`Tensor`): mean squared errors of the prediction of the
            policy and of the reference at the same noise and level, shape ``(pairs,)``, float32.
        weights (`Tensor`): shape ``(pairs,)``; 0 for skipped pairs.
        labels (`Tensor` or `float`): ``q``, probability that the chosen side is the better one.
        beta_dpo (`float`): ``beta``.
        loss_type (`str`): see above.

    Returns:
        `ObjectiveOutput`: with metrics over the pairs of positive weight, NaN if there are none: ``dpo/accuracy``, the
        share with ``h > 0``, and ``dpo/margin``, the mean of ``beta h``.
    """
    margin = -0.5 * ((chosen - reference_chosen) - (rejected - reference_rejected))
    logits = beta_dpo * margin
    cross_entropy = -labels * logsigmoid(logits) - (1 - labels) * logsigmoid(-logits)
    losses = (logits - 0.5) ** 2 if loss_type == "ipo" else cross_entropy
    counted = weights > 0
    return ObjectiveOutput(
        (weights * losses).mean(),
        {
            "dpo/accuracy": (margin.detach() > 0).float().where(counted, torch.nan).nanmean(),
            "dpo/margin": logits.detach().where(counted, torch.nan).nanmean(),
        },
    )
