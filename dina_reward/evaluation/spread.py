"""Whether a reward knows what it does not know: its spread against its errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dina_reward.data.records import collate_preferences
from dina_reward.likelihood import ThurstoneModel, ensemble_level, log_ndtr
from dina_reward.modeling.spread import SpreadName
from dina_reward.noise.draws import fold_seed


if TYPE_CHECKING:
    from dina_reward.reward import LatentReward

_GRID = 200


@dataclass(frozen=True)
class SpreadFit:
    """How the spread of scores goes with their errors.

    Args:
        scale: standard error of a score over its spread; 0 where the spread says nothing.
        gain: by which the negative log-likelihood falls when the spread is known, in nats per pair.
        accuracy_sure, accuracy_unsure: of the half of the pairs with the smaller and with the larger spread.
    """

    scale: float
    gain: float
    accuracy_sure: float
    accuracy_unsure: float


def fit_spread(margins: Tensor, spreads: Tensor, p_chosen: Tensor, variance: float) -> SpreadFit:
    """The ``s`` of ``P(a > b) = Phi(margin / sqrt(2 v + s^2 (u_a^2 + u_b^2)))`` with the least mean negative log-likelihood.

    Args:
        margins (`Tensor`): chosen minus rejected score, shape ``(pairs,)``.
        spreads (`Tensor`): ``sqrt(u_a^2 + u_b^2)``, shape ``(pairs,)``.
        p_chosen (`Tensor`): labels, shape ``(pairs,)``.
        variance: ``v``, of the likelihood at the level of the scores.

    Raises:
        ValueError: shapes differ or there are less than four pairs.
    """
    if not (margins.shape == spreads.shape == p_chosen.shape and margins.ndim == 1 and len(margins) >= 4):
        raise ValueError(
            f"margins {tuple(margins.shape)}, spreads {tuple(spreads.shape)} and p_chosen {tuple(p_chosen.shape)} must all "
            "be (pairs,), of at least four pairs"
        )
    margin, spread, label = (tensor.double() for tensor in (margins, spreads, p_chosen))
    grid = torch.cat([torch.zeros(1), torch.logspace(-2, 1.4771, _GRID)]).double()
    z = margin / (2 * variance + grid[:, None] ** 2 * spread**2).sqrt()
    losses = -(label * log_ndtr(z) + (1 - label) * log_ndtr(-z)).mean(dim=1)
    best = int(losses.argmin())
    right = ((margin > 0) == (label > 0.5)).double()
    order = spread.argsort()
    half = len(order) // 2
    sure, unsure = float(right[order[:half]].mean()), float(right[order[half:]].mean())
    return SpreadFit(float(grid[best]), float(losses[0] - losses[best]), sure, unsure)


@torch.no_grad()
def calibrate_spread(
    reward: LatentReward,
    pairs: Iterable[Mapping[str, Any]],
    *,
    spread: SpreadName | None = None,
    noise_level: float | tuple[float, ...] | None = None,
    num_noise_samples: int = 1,
    seed: int = 0,
    batch_size: int = 8,
) -> SpreadFit:
    """Fits ``spread_scale`` to pairs and puts it into the reward's configuration, which `save_pretrained` writes.

    Examples:
        >>> fit = calibrate_spread(reward, pairs, spread="draws", num_noise_samples=4)
        >>> cautious = reward(latents, prompts, num_noise_samples=4, kappa=1.0)

    Args:
        reward: with a Thurstone likelihood; its configuration is replaced.
        pairs: preference records that it has not been trained on, best of samples that it does not know.
        spread, noise_level, num_noise_samples: as the reward will be used, see `LatentReward.score`.
        seed: of the noise.
        batch_size: pairs per batch; does not change the result.

    Raises:
        ValueError: another likelihood, too few pairs, or nothing to take a spread over.
    """
    model = reward.preference_model
    if not isinstance(model, ThurstoneModel):
        raise ValueError(
            f"the reward's likelihood is {reward.config.likelihood!r}, which has no variance to compare with"
        )
    unscaled = replace(reward.config, spread_scale=1.0)
    reward.config = reward.model.config = unscaled
    rows, margins, spreads, labels, position = iter(pairs), [], [], [], 0
    while records := list(islice(rows, batch_size)):
        batch = collate_preferences(records)
        seeds = [fold_seed(seed, position + row) for row in range(len(records))] * 2
        options = {"noise_level": noise_level, "num_noise_samples": num_noise_samples, "seed": seeds}
        latents = torch.cat([batch["chosen"], batch["rejected"]]).to(reward.device)
        with reward.prompt_encoder.given(batch["prompts"], batch["conditioning"]):
            output = reward.score(latents, batch["prompts"] * 2, spread=spread or _any(reward, options), **options)  # type: ignore[arg-type]
        assert output.spread is not None
        chosen, rejected = output.scores.cpu().chunk(2)
        first, second = output.spread.cpu().chunk(2)
        margins.append(chosen - rejected)
        spreads.append((first**2 + second**2).sqrt())
        labels.append(batch["p_chosen"])
        level = ensemble_level(output.noise_levels.cpu())
        position += len(records)
    if not margins:
        raise ValueError("got no preference pairs to calibrate with")
    found = fit_spread(torch.cat(margins), torch.cat(spreads), torch.cat(labels), float(model.variance(level)))
    reward.config = reward.model.config = replace(unscaled, spread_scale=float(f"{found.scale:.3g}"))
    return found


def _any(reward: LatentReward, options: Mapping[str, Any]) -> SpreadName:
    """What a score would take its spread over by default."""
    if reward.config.head.num_members > 1:
        return "heads"
    return "draws" if options["num_noise_samples"] > 1 else "levels"
