"""The variance of the Thurstone likelihood that fits scores best: calibration after training, scores unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dina_reward.evaluation.pair_scores import PairProtocol, score_pairs
from dina_reward.likelihood import ThurstoneModel, log_ndtr


if TYPE_CHECKING:
    from dina_reward.reward import LatentReward

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def fit_variance(margins: Tensor, noise_levels: Sequence[float], p_chosen: Tensor) -> ThurstoneModel:
    """The ``k`` and ``c`` of ``var(sigma) = k sigma^2 + c`` with the least mean negative log-likelihood.

    What temperature scaling (arXiv 1706.04599) is to a classifier, with a temperature that depends on the noise level.
    Scores and rankings stay as they are; only probabilities change. Fit it to pairs that the reward has not been trained on,
    all of them: without the close ones, probabilities near one half would have no say.

    Args:
        margins (`Tensor`): chosen minus rejected score, shape ``(pairs, levels)``.
        noise_levels: the levels.
        p_chosen (`Tensor`): labels in ``[0, 1]``, shape ``(pairs,)``.

    Raises:
        ValueError: shapes differ, less than two levels, no pairs, or no variance is the best one: scores that are right
            about every certain label ask for none at all, scores without relation to the labels for an infinite one.
    """
    if margins.ndim != 2 or margins.shape != (len(p_chosen), len(noise_levels)) or margins.shape[0] == 0:
        raise ValueError(
            f"margins have shape {tuple(margins.shape)}; expected ({len(p_chosen)}, {len(noise_levels)}), a row per pair "
            "and a column per level, with at least one pair"
        )
    if len(set(noise_levels)) < 2:
        raise ValueError(
            f"k and c are two numbers, so they need pairs at two noise levels or more, got {list(noise_levels)}"
        )
    scores = margins.double().flatten()
    sigma = torch.tensor(noise_levels, dtype=torch.float64).expand(margins.shape).flatten()
    target = p_chosen.double()[:, None].expand(margins.shape).flatten()
    published = ThurstoneModel()
    logarithms = torch.tensor([published.variance_scale, published.variance_offset], dtype=torch.float64).log()
    logarithms.requires_grad_()
    optimizer = torch.optim.LBFGS([logarithms], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scale, offset = logarithms.exp()
        z = scores / (2 * (scale * sigma**2 + offset)).sqrt()
        loss = -(target * log_ndtr(z) + (1 - target) * log_ndtr(-z)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    scale, offset = logarithms.detach().exp().tolist()
    share = (scale * sigma**2 + offset).mean() / scores.square().mean()
    if not 1e-4 < share < 1e4:
        what = "order every pair as its label does" if share < 1 else "say nothing about the labels"
        raise ValueError(f"no variance fits best, because the scores {what}; fit it to more pairs, or to other ones")
    return ThurstoneModel(scale, offset)


def calibrate_variance(
    reward: LatentReward,
    pairs: Iterable[Mapping[str, Any]],
    *,
    noise_levels: Sequence[float] = LEVELS,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = True,
) -> ThurstoneModel:
    """Fits the variance to pairs and puts it into the reward's configuration, which `LatentReward.save_pretrained` writes.

    Examples:
        >>> calibrate_variance(reward, load_preferences("fresh-pairs"))
        ThurstoneModel(variance_scale=3.96, variance_offset=0.174)
        >>> reward.save_pretrained("calibrated")

    Args:
        reward: with a Thurstone likelihood; its configuration is replaced.
        pairs: preference records that it has not been trained on.
        noise_levels: levels to fit at.
        seed: of the noise.
        batch_size: pairs per batch; does not change the result.
        progress: show a progress bar.

    Raises:
        ValueError: the reward has another likelihood, or as for `fit_variance`.
    """
    config = reward.config
    if config.likelihood != "thurstone":
        raise ValueError(f"the reward's likelihood is {config.likelihood!r}, which has no variance to calibrate")
    protocol = PairProtocol(tuple(noise_levels), None, seed=seed)
    scores = score_pairs(reward, pairs, protocol, batch_size=batch_size, progress=progress)
    found = fit_variance(scores.margins, noise_levels, scores.p_chosen)
    # Three digits: what is written into a configuration should say no more than is known.
    fitted = ThurstoneModel(_three_digits(found.variance_scale), _three_digits(found.variance_offset))
    config = replace(config, variance_scale=fitted.variance_scale, variance_offset=fitted.variance_offset)
    reward.config = reward.model.config = config
    return fitted


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")
