"""Things that score: a `LatentReward` at several settings, or any function of latents or images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dina_reward.evaluation.cost import timed
from dina_reward.evaluation.settings import Setting, evaluation_settings
from dina_reward.likelihood import ensemble_level
from dina_reward.noise.draws import draw_noise
from dina_reward.reward_functions import RewardFunction, call_scorer, callable_name, takes_images


if TYPE_CHECKING:
    from dina_reward.reward import LatentReward


@dataclass(frozen=True)
class BatchScores:
    """Scores of one batch.

    Args:
        scores (`Tensor`): shape ``(samples, settings)``, float32, on the CPU.
        seconds: what each setting took; work that settings share is divided between them as if each did its own.
    """

    scores: Tensor
    seconds: tuple[float, ...]


class Scorer(ABC):
    """One reward in an evaluation.

    Args:
        name: in tables and plots.
        settings: columns of the scores.
        inputs: what it reads, ``"latents"`` or ``"images"`` (float, ``(batch, 3, height, width)``, in [0, 1]).
        device: where inputs are put.
    """

    likelihood: str | None = None
    """The probability model that calibration is measured of; ``None`` without one."""

    def __init__(
        self, name: str, settings: Sequence[Setting], inputs: Literal["latents", "images"], device: torch.device
    ) -> None:
        self.name, self.settings, self.inputs, self.device = name, tuple(settings), inputs, device

    @abstractmethod
    def score(self, batch: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> BatchScores:
        """Scores latents or images of one shape.

        Args:
            batch: on the scorer's device.
            prompts: one per sample.
            seeds: of each sample's noise.
        """

    def probabilities(self, margins: Tensor) -> Tensor | None:
        """Predicted probability that the first side is preferred, ``(pairs, settings)``; ``None`` without a likelihood."""
        return None


class LatentScorer(Scorer):
    """A `LatentReward` at several settings.

    All settings of a sample see the same noise: a setting with fewer draws uses the first of those of the others, and all
    levels share them. Its probabilities are those of the checkpoint's likelihood; averaging over noise draws is not taken
    into account, because no likelihood has a figure for it.

    Examples:
        >>> scorer = LatentScorer(reward, evaluation_settings(levels=(0.2, 0.4), draws=(1, 4)))

    Args:
        reward: the reward.
        settings: default `evaluation_settings()`.
        name: default ``"latent_reward"``.
    """

    def __init__(
        self, reward: LatentReward, settings: Sequence[Setting] | None = None, *, name: str = "latent_reward"
    ) -> None:
        settings = evaluation_settings() if settings is None else settings
        empty = [setting.name for setting in settings if not setting.levels]
        if empty or not settings:
            raise ValueError(f"every setting of a latent reward needs a noise level, got {list(settings)}")
        super().__init__(name, settings, "latents", reward.device)
        self.reward = reward
        self.likelihood = reward.config.likelihood

    @torch.no_grad()
    def score(self, batch: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> BatchScores:
        draws = max(setting.draws for setting in self.settings)
        spatial = self.reward.family.unpack_latents(batch, self.reward.config.backbone_config)
        noise = draw_noise(spatial, num_samples=draws, seed=seeds)
        parts = [self._one_draw(spatial, prompts, noise[draw], draw) for draw in range(draws)]
        scores, seconds = [], []
        for setting in self.settings:
            used = [part[setting.levels, setting.ensemble] for part in parts[: setting.draws]]
            scores.append(torch.stack([each for each, _ in used]).mean(dim=0))
            seconds.append(sum(spent for _, spent in used))
        return BatchScores(torch.stack(scores, dim=1).float().cpu(), tuple(seconds))

    def probabilities(self, margins: Tensor) -> Tensor:
        model, columns = self.reward.preference_model, zip(margins.T, self.settings, strict=True)
        return torch.stack(
            [
                model.probability(margin, torch.zeros_like(margin), ensemble_level(torch.tensor(setting.levels)))
                for margin, setting in columns
            ],
            dim=1,
        )

    def _one_draw(
        self, latents: Tensor, prompts: Sequence[str], noise: Tensor, draw: int
    ) -> dict[tuple[tuple[float, ...], str], tuple[Tensor, float]]:
        """Scores ``(batch,)`` and seconds by levels and ensemble, for the settings that use this draw."""
        results: dict[tuple[tuple[float, ...], str], tuple[Tensor, float]] = {}
        wanted = [setting for setting in self.settings if setting.draws > draw]
        separate = [setting for setting in wanted if not setting.is_ensemble or setting.ensemble == "mean"]
        levels = sorted({level for setting in separate for level in setting.levels})
        if levels:
            with timed() as seconds:
                output = self.reward.score(latents, prompts, noise_level=levels, ensemble="mean", noise=noise)
            for setting in separate:
                columns = [levels.index(level) for level in setting.levels]
                scores = output.level_scores[:, columns].mean(dim=1)
                results[setting.levels, setting.ensemble] = (scores, seconds[0] * len(columns) / len(levels))
        for tokens in sorted({setting.levels for setting in wanted if setting not in separate}):
            with timed() as seconds:
                scores = self.reward(latents, prompts, noise_level=tokens, ensemble="tokens", noise=noise)
            results[tokens, "tokens"] = (scores, seconds[0])
        return results


class CallableScorer(Scorer):
    """Any function of latents or images, called as a reward function of the alignment trainers is.

    Examples:
        >>> def brightness(images, prompts):
        ...     return images.mean(dim=(1, 2, 3))
        >>> scorer = CallableScorer(brightness)

    Args:
        function: takes some of ``latents``, ``images`` (float, ``(batch, 3, height, width)``, in [0, 1]), ``prompts`` and
            ``seed`` by keyword, and returns one number per sample.
        name: default the function's name.
        inputs: default ``"images"`` where the function names that argument, else ``"latents"``.
        likelihood: ``"bradley_terry"`` if ``sigmoid(a - b)`` is meant to be the probability that ``a`` is preferred;
            ``None`` (no calibration) if scores have no such meaning.
        device: where inputs are put.
    """

    def __init__(
        self,
        function: RewardFunction,
        *,
        name: str | None = None,
        inputs: Literal["latents", "images"] | None = None,
        likelihood: Literal["bradley_terry"] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        inputs = inputs or ("images" if takes_images(function) else "latents")
        super().__init__(name or callable_name(function), (Setting(),), inputs, torch.device(device))
        if likelihood not in (None, "bradley_terry"):
            raise ValueError(f"likelihood must be None or 'bradley_terry', got {likelihood!r}")
        self.function, self.likelihood = function, likelihood

    def score(self, batch: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> BatchScores:
        available = {self.inputs: batch, "prompts": list(prompts), "seed": list(seeds)}
        with timed() as seconds:
            scores = call_scorer(self.function, available, len(batch))
        if bool(scores.isnan().any()):
            row = int(scores.isnan().nonzero()[0])
            raise ValueError(f"{self.name} gave no score for the prompt {prompts[row]!r}; accuracy needs one for each")
        return BatchScores(scores[:, None], tuple(seconds))

    def probabilities(self, margins: Tensor) -> Tensor | None:
        return torch.sigmoid(margins) if self.likelihood == "bradley_terry" else None
