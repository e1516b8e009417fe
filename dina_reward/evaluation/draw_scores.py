"""Margins of pairs at several noise levels under several noise draws, from which any average of levels or draws is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dina_reward.data.preference import Preference
from dina_reward.evaluation.cost import timed
from dina_reward.evaluation.scored_pairs import score_dataset
from dina_reward.evaluation.scorers import BatchScores, Scorer
from dina_reward.evaluation.settings import Setting
from dina_reward.likelihood import PreferenceModel
from dina_reward.noise.draws import draw_noise


if TYPE_CHECKING:
    from dina_reward.reward import LatentReward

Levels = tuple[float, ...]


@dataclass(frozen=True)
class DrawMargins:
    """Margins of a dataset under independent noise draws; every level sees the same draws.

    Draw ``k`` of one level and draw ``k + 1`` of another are independent, so that one table holds ensembles whose levels
    share their noise and ensembles whose levels have noise of their own.

    Args:
        noise_levels: levels, each scored alone.
        margins (`Tensor`): ``a`` minus ``b`` score, shape ``(pairs, levels, draws)``.
        tokens: margins of token ensembles by levels and whether these share their noise, shape ``(pairs, draws)``.
        labels (`Tensor`): probability that ``a`` is preferred, shape ``(pairs,)``, float64.
        clusters: what is resampled together, one per pair: the prompt.
        preference_model: the reward's likelihood.
    """

    noise_levels: Levels
    margins: Tensor
    tokens: Mapping[tuple[Levels, bool], Tensor]
    labels: Tensor
    clusters: Sequence[object]
    preference_model: PreferenceModel

    @property
    def draws(self) -> int:
        """Number of draws."""
        return self.margins.shape[2]

    def at(self, level: float) -> Tensor:
        """Margins at one level, one draw each, shape ``(pairs, draws)``."""
        return self.margins[:, self.noise_levels.index(level)]

    def of_draws(self, level: float, count: int) -> Tensor:
        """Averages of ``count`` draws at one level, ``(pairs, repetitions)``: every run of as many draws, around the end.

        Raises:
            ValueError: there are not so many draws.
        """
        if not 1 <= count <= self.draws:
            raise ValueError(f"cannot average {count} draws of {self.draws}")
        repetitions = self.draws if count < self.draws else 1
        one = self.at(level)
        return torch.stack([one.roll(-start, 1)[:, :count].mean(dim=1) for start in range(repetitions)], dim=1)

    def of_levels(self, levels: Levels, *, shared: bool) -> Tensor:
        """Averages over levels, which share a draw or have one each, shape ``(pairs, draws)``.

        Raises:
            ValueError: more levels than draws, and they are to have one each.
        """
        if not shared and len(levels) > self.draws:
            raise ValueError(f"{len(levels)} levels with noise of their own need as many draws, got {self.draws}")
        shifts = [0 if shared else place for place in range(len(levels))]
        parts = [self.at(level).roll(-shift, 1) for level, shift in zip(levels, shifts, strict=True)]
        return torch.stack(parts).mean(dim=0)


class DrawScorer(Scorer):
    """A `LatentReward` at several levels under several draws, each scored on its own.

    Args:
        reward: the reward.
        noise_levels: levels, each scored alone.
        ensembles: token ensembles, each scored with noise that its levels share, and with noise of their own.
        draws: noise draws, at least as many as an ensemble has levels.
    """

    def __init__(
        self, reward: LatentReward, noise_levels: Sequence[float], ensembles: Sequence[Levels], draws: int
    ) -> None:
        longest = max((len(levels) for levels in ensembles), default=1)
        if draws < max(2, longest):
            raise ValueError(
                f"got {draws} noise draws; at least two tell noise from signal, and an ensemble of {longest} levels whose "
                f"noise is independent needs {longest}"
            )
        self.noise_levels, self.draws = tuple(noise_levels), draws
        self.tokens = [(levels, shared) for levels in ensembles for shared in (True, False)]
        settings = [Setting((level,)) for level in self.noise_levels] + [Setting(levels) for levels, _ in self.tokens]
        super().__init__("noise draws", [each for each in settings for _ in range(draws)], "latents", reward.device)
        self.reward = reward

    @torch.no_grad()
    def score(self, batch: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> BatchScores:
        with timed() as seconds:
            spatial = self.reward.family.unpack_latents(batch, self.reward.config.backbone_config)
            noise = draw_noise(spatial, num_samples=self.draws, seed=seeds)
            alone = [
                self.reward.score(
                    spatial, prompts, noise_level=self.noise_levels, ensemble="mean", noise=each
                ).level_scores
                for each in noise
            ]
            columns = [torch.stack(alone, dim=2).flatten(1)]
            columns += [
                self._tokens(spatial, prompts, levels, noise.roll(-draw, 0), shared)[:, None]
                for levels, shared in self.tokens
                for draw in range(self.draws)
            ]
        scores = torch.cat(columns, dim=1).float().cpu()
        return BatchScores(scores, (seconds[0] / scores.shape[1],) * scores.shape[1])

    def _tokens(self, latents: Tensor, prompts: Sequence[str], levels: Levels, noise: Tensor, shared: bool) -> Tensor:
        """One token ensemble, with the first draw for all levels or the first draws, one for each; shape ``(batch,)``."""
        given = noise[0] if shared else noise[: len(levels), None]
        return self.reward(
            latents, prompts, noise_level=levels, ensemble="tokens", noise=given, share_noise_across_levels=shared
        )


def score_draws(
    reward: LatentReward,
    pairs: Iterable[Preference | Mapping[str, Any]],
    noise_levels: Sequence[float],
    *,
    ensembles: Sequence[Sequence[float]] = (),
    draws: int = 4,
    pipeline: Any | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> DrawMargins:
    """Scores a dataset at several levels under several noise draws; both sides of a pair see the same ones.

    Args:
        reward: the reward.
        pairs: `Preference` records, or rows of training data.
        noise_levels: levels, each scored alone.
        ensembles: levels of token ensembles; averages of levels need no scoring of their own.
        draws: noise draws, at least as many as an ensemble has levels.
        pipeline: diffusers pipeline that encodes images.
        batch_size: samples per pass; does not change results.
        seed: of the noise.
        progress: show a progress bar.

    Raises:
        ValueError: too few draws, no pairs, or a record that cannot be used.
    """
    groups = [tuple(levels) for levels in ensembles]
    scorer = DrawScorer(reward, noise_levels, groups, draws)
    scored = score_dataset(scorer, pairs, pipeline=pipeline, batch_size=batch_size, seed=seed, progress=progress)
    alone, *tokens = scored.table.margins(scored.scores).split(
        [draws * len(scorer.noise_levels), *[draws] * len(scorer.tokens)], dim=1
    )
    return DrawMargins(
        noise_levels=scorer.noise_levels,
        margins=alone.unflatten(1, (-1, draws)),
        tokens=dict(zip(scorer.tokens, tokens, strict=True)),
        labels=scored.table.labels,
        clusters=scored.table.clusters,
        preference_model=reward.preference_model,
    )
