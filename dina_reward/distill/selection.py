"""Which samples, or pairs of them, are worth a judge's time."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dina_reward.likelihood import PreferenceModel, ThurstoneModel, ensemble_level
from dina_reward.noise.draws import fold_seed
from dina_reward.reward import LatentReward


_EXPLORE = 0x65787064
_SPREAD_WEIGHT = 0.5
_LOGISTIC_VARIANCE = math.pi**2 / 3


@dataclass(frozen=True)
class Selection:
    """What a judge is asked about.

    Args:
        groups: for every prompt the numbers of the samples to judge, from the whole set.
        pairs: pairs of samples whose preference is wanted, first and second side.
    """

    groups: list[list[int]]
    pairs: list[tuple[int, int]]

    @property
    def samples(self) -> list[int]:
        """All samples of the groups, in order."""
        return [sample for group in self.groups for sample in group]


def informativeness(probability: Tensor, spread: Tensor) -> Tensor:
    """How much a judgement of a pair would teach, elementwise, in ``[0, 1.5]``.

    The entropy of ``P(a > b)`` in bits, which is 1 where the reward cannot tell the sides apart, plus half the noise spread
    of the margin in units of the deviation that the likelihood grants it (at most 1).

    Args:
        probability (`Tensor`): ``P(a > b)`` under the reward.
        spread (`Tensor`): standard deviation of the margin over noise draws, over that of the likelihood.
    """
    p = probability.double().clamp(1e-12, 1 - 1e-12)
    entropy = -(p * p.log2() + (1 - p) * (1 - p).log2())
    return entropy + _SPREAD_WEIGHT * spread.double().clamp(max=1)


def select(
    candidates: Sequence[Sequence[int]],
    scores: Tensor | None,
    spreads: Tensor | None,
    *,
    group_size: int,
    exploration: float,
    seed: int,
    model: PreferenceModel | None = None,
    level: float = 0.4,
) -> Selection:
    """Picks ``group_size`` samples of each prompt, and the pairs among them in the order of what they teach.

    Args:
        candidates: for every prompt the numbers of its samples.
        scores (`Tensor`, *optional*): of all samples by the reward so far; without it, samples are drawn at random.
        spreads (`Tensor`, *optional*): standard deviations of the scores over noise draws.
        group_size: samples to judge of each prompt.
        exploration: share of prompts whose samples are drawn at random all the same, so that what the reward is wrongly
            sure of is seen too.
        seed: of random draws.
        model: likelihood that turns scores into probabilities; the published one by default.
        level: noise level that the scores were made at.
    """
    groups, ranked = [], []
    for number, members in enumerate(candidates):
        rng = random.Random(fold_seed(seed, _EXPLORE, number))
        explores = rng.random() < exploration
        if scores is None or spreads is None or explores:
            chosen = sorted(rng.sample(list(members), min(group_size, len(members))))
            worth = {pair: rng.random() for pair in itertools.combinations(chosen, 2)}
        else:
            pairs = list(itertools.combinations(members, 2))
            values = _worth(pairs, scores, spreads, model or ThurstoneModel(), level)
            chosen = _greedy(pairs, values, group_size)
            worth = {pair: value for pair, value in zip(pairs, values, strict=True) if set(pair) <= set(chosen)}
        groups.append(chosen)
        ranked.append(sorted(worth, key=lambda pair: (-worth[pair], pair)))
    # The best pair of every prompt, then the second best of each: a budget that ends early has seen all prompts.
    rounds = itertools.zip_longest(*ranked)
    return Selection(groups, [pair for each in rounds for pair in each if pair is not None])


def _worth(
    pairs: Sequence[tuple[int, int]], scores: Tensor, spreads: Tensor, model: PreferenceModel, level: float
) -> list[float]:
    a, b = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    sigma = torch.tensor(level)
    granted = 2 * model.variance(sigma) if isinstance(model, ThurstoneModel) else torch.tensor(_LOGISTIC_VARIANCE)
    spread = (spreads[a].square() + spreads[b].square()).sqrt() / granted.sqrt()
    return informativeness(model.probability(scores[a], scores[b], sigma), spread).tolist()


def _greedy(pairs: Sequence[tuple[int, int]], worth: Sequence[float], size: int) -> list[int]:
    """Samples of the best pairs, until there are ``size``."""
    chosen: dict[int, None] = {}
    for _, pair in sorted(zip(worth, pairs, strict=True), key=lambda item: (-item[0], item[1])):
        for sample in pair:
            if len(chosen) < size:
                chosen[sample] = None
    return sorted(chosen)


@torch.no_grad()
def score_candidates(
    reward: LatentReward, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int], *, draws: int, batch_size: int
) -> tuple[Tensor, Tensor, float]:
    """Scores of samples and their spread over noise draws, each of shape ``(samples,)``, and the level they stand for.

    Args:
        reward: the reward so far.
        latents: samples, shape ``(samples, ...)``.
        prompts, seeds: one per sample; samples of one prompt may share a seed, so that noise cancels between them.
        draws: noise draws, at least 2.
        batch_size: samples per pass; does not change results.
    """
    output = reward.score(
        latents.to(reward.device), list(prompts), seed=list(seeds), num_noise_samples=draws, batch_size=batch_size
    )
    assert output.noise_std is not None
    return output.scores.cpu(), output.noise_std.cpu(), float(ensemble_level(output.noise_levels))
