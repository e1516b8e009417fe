"""Metrics of pairs: running ones in training, exact across ranks and micro-batches, and those of an evaluation."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from dina_reward.evaluation import PairProtocol, pairwise_accuracy
from dina_reward.likelihood import PreferenceLoss


_NOISE_THIRDS = ("low_noise", "mid_noise", "high_noise")


class PairMetrics:
    """Sums over the pairs seen since the last log line.

    | metric | meaning |
    |---|---|
    | ``accuracy`` | share of pairs whose preferred side scores higher; equal scores count half, tied targets not at all |
    | ``margin`` | mean of preferred minus other score |
    | ``accuracy/low_noise``, ``mid_noise``, ``high_noise`` | the same by thirds of the level's range [0, 1] |
    | ``loss/low_noise``, ``mid_noise``, ``high_noise`` | mean loss by thirds |
    """

    _names = ("accuracy", "margin", *(f"{name}/{third}" for name in ("accuracy", "loss") for third in _NOISE_THIRDS))

    def __init__(self) -> None:
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64)

    def update(self, margin: Tensor, loss: Tensor, level: Tensor, p_chosen: Tensor) -> None:
        """Adds a micro-batch; all arguments have shape ``(pairs,)``, ``margin`` is chosen minus rejected score."""
        margin, loss, level, p_chosen = (x.detach().double().cpu() for x in (margin, loss, level, p_chosen))
        preference = (p_chosen - 0.5).sign()
        decided = preference != 0
        margin = (margin * preference)[decided]
        right = (margin.sign() + 1) / 2
        third = (level * 3).long().clamp(max=2)
        values = [right, margin]
        values += [
            part[thirds == index] for part, thirds in ((right, third[decided]), (loss, third)) for index in range(3)
        ]
        self._sums[0] += torch.stack([value.sum() for value in values])
        self._sums[1] += torch.tensor([float(len(value)) for value in values])

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all ranks since the last call; a metric without a pair is left out. Every rank must call it."""
        # float32 for devices without float64; counts are exact up to 2^24 pairs per log line
        sums, counts = accelerator.reduce(self._sums.float().to(accelerator.device), reduction="sum").cpu()
        self._sums.zero_()
        return {
            name: float(total / count)
            for name, total, count in zip(self._names, sums, counts, strict=True)
            if count > 0
        }


def evaluation_metrics(
    chosen: Tensor, rejected: Tensor, p_chosen: Tensor, protocol: PairProtocol, loss: PreferenceLoss
) -> dict[str, float]:
    """Metrics of scored pairs.

    | metric | meaning |
    |---|---|
    | ``accuracy_<level>``, ``accuracy_ensemble`` | pairwise accuracy of a setting; tied labels are left out |
    | ``accuracy`` | mean of the accuracies at the single levels |
    | ``margin`` | mean of chosen minus rejected score over pairs and single levels |
    | ``loss``, ``brier`` | mean loss and mean ``(P(chosen > rejected) - p_chosen)^2`` over the same, unweighted |

    Args:
        chosen, rejected (`Tensor`): scores, shape ``(pairs, settings)``.
        p_chosen (`Tensor`): labels, shape ``(pairs,)``.
        protocol: names the settings.
        loss: the training loss; its likelihood gives the probabilities.
    """
    levels, margins = protocol.noise_levels, chosen - rejected
    accuracies = [pairwise_accuracy(column, p_chosen).value for column in margins.T]
    metrics = {f"accuracy_{name}": value for name, value in zip(protocol.settings, accuracies, strict=True)}
    metrics["accuracy"] = sum(accuracies[: len(levels)]) / len(levels)
    metrics["margin"] = float(margins[:, : len(levels)].mean())
    losses, briers = [], []
    for column, level in enumerate(torch.tensor(levels)):
        sides = chosen[:, column], rejected[:, column]
        losses.append(loss(*sides, level, p_chosen))
        briers.append((loss.probability(*sides, level) - p_chosen).square().mean())
    metrics["loss"] = float(torch.stack(losses).mean())
    metrics["brier"] = float(torch.stack(briers).mean())
    return metrics
