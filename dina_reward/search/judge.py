"""The rewards of a search: scores of clean latents and of states on the way, their gradient, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dina_reward.alignment.experience.rewards import RewardSet, checked_reward_weights, differentiable_score
from dina_reward.alignment.generator import Generator
from dina_reward.checks.values import check_choice
from dina_reward.families import Conditioning
from dina_reward.likelihood import ThurstoneModel, ensemble_level
from dina_reward.reward import LatentReward
from dina_reward.reward_functions import RewardFunction, callable_name, reward_list, takes_images, unwrapped


ScoredAs = Literal["state", "clean"]


class Judge:
    """Weighted sum of the rewards of clean latents, and of states inside a sampler.

    A `LatentReward` scores a state as it is, at its own noise level. Any other callable, and with ``score_as="clean"`` a
    `LatentReward` too, scores the clean latent that the denoiser predicts at the state. Rewards that name ``images`` make
    the search decode, which it says once.

    Args:
        generator: decodes, and counts calls.
        rewards: one reward function or several, as in the trainers.
        weights: one per function; all 1 by default.
        settings: ``noise_level``, ``ensemble`` and ``num_noise_samples`` for rewards of clean latents.
        score_as: what a `LatentReward` looks at in the middle.

    Raises:
        ValueError: a reward cannot be called, or another number of weights than rewards.
    """

    def __init__(
        self,
        generator: Generator,
        rewards: RewardFunction | Sequence[RewardFunction],
        *,
        weights: Sequence[float] | None = None,
        settings: Mapping[str, Any] | None = None,
        score_as: ScoredAs = "state",
    ) -> None:
        self.generator = generator
        check_choice("score_as", score_as, get_args(ScoredAs))
        functions = reward_list(rewards, "reward")
        self.weights = torch.tensor(checked_reward_weights(weights, len(functions)), dtype=torch.float32)
        self.rewards = RewardSet(functions, dict(settings or {}), generator.decode)
        of_states = [score_as == "state" and isinstance(unwrapped(function), LatentReward) for function in functions]
        self._of_states = [place for place, aware in enumerate(of_states) if aware]
        self._of_clean = [place for place, aware in enumerate(of_states) if not aware]
        self._clean_part = (
            RewardSet([functions[place] for place in self._of_clean], self.rewards.settings, generator.decode)
            if self._of_clean
            else None
        )

    @property
    def functions(self) -> Sequence[RewardFunction]:
        """The reward functions."""
        return self.rewards.functions

    @property
    def needs_prediction(self) -> bool:
        """Whether states are scored through the denoiser's prediction of the clean latent."""
        return bool(self._of_clean)

    def clean(
        self, latents: Tensor, prompts: Sequence[str], conditioning: Conditioning, seeds: Sequence[int]
    ) -> Tensor:
        """Scores of clean latents.

        Args:
            latents (`Tensor`): shape ``(rows, ...)``, spatial layout.
            prompts: one per row.
            conditioning: encoded prompts, one row per latent.
            seeds: noise seed of each row.

        Returns:
            `Tensor`: shape ``(rows,)``, float32, on the CPU; minus infinity where no reward applies.
        """
        self.generator.calls.count_rewards(len(latents))
        rows = [{"prompt": prompt} for prompt in prompts]
        return self._weighted(self.rewards.score(latents, rows, conditioning, seeds))

    def states(
        self,
        states: Tensor,
        noise_level: float,
        prompts: Sequence[str],
        conditioning: Conditioning,
        seeds: Sequence[int],
        clean: Tensor | None = None,
    ) -> Tensor:
        """Scores of states at one noise level.

        Args:
            states (`Tensor`): shape ``(rows, ...)``, scaled as the denoiser sees them.
            noise_level: standard deviation of their noise in the model's process.
            clean (`Tensor`, *optional*): predicted clean latents; needed if `needs_prediction`.

        Other arguments and result as for `clean`.
        """
        self.generator.calls.count_rewards(len(states))
        columns: dict[int, Tensor] = {}
        for place in self._of_states:
            reward: Any = unwrapped(self.functions[place])
            with torch.no_grad():
                columns[place] = reward.score_noisy(states, list(prompts), noise_level=noise_level).cpu()
        if self._clean_part is not None:
            assert clean is not None
            rows = [{"prompt": prompt} for prompt in prompts]
            scores = self._clean_part.score(clean, rows, conditioning, seeds)
            columns |= dict(zip(self._of_clean, scores.unbind(dim=1), strict=True))
        return self._weighted(torch.stack([columns[place] for place in range(len(self.functions))], dim=1))

    def differentiable_states(self, states: Tensor, noise_level: float, prompts: Sequence[str]) -> Tensor:
        """Scores of states with a graph back to them, shape ``(rows,)``, on their device.

        Raises:
            ValueError: some reward cannot score states.
        """
        if self._of_clean:
            blind = callable_name(self.functions[self._of_clean[0]])
            raise ValueError(
                f"{blind} cannot score a noisy state, so there is no gradient at the state; use target='clean', or a "
                "LatentReward with score_as='state'"
            )
        self.generator.calls.count_rewards(len(states))
        rewards: list[Any] = [unwrapped(function) for function in self.functions]
        scores = [reward.score_noisy(states, list(prompts), noise_level=noise_level) for reward in rewards]
        return torch.stack(scores, dim=1) @ self.weights.to(states.device)

    def differentiable_clean(
        self, latents: Tensor, prompts: Sequence[str], conditioning: Conditioning, seeds: Sequence[int]
    ) -> Tensor:
        """Scores of clean latents with a graph back to them, shape ``(rows,)``, on their device.

        Raises:
            ValueError: some reward takes images, or is not differentiable.
        """
        for function in self.functions:
            if takes_images(function):
                raise ValueError(
                    f"{callable_name(function)} takes images, and gradients stay in latent space; give a reward on "
                    "`latents`, or a method without gradients"
                )
        self.generator.calls.count_rewards(len(latents))
        rows = [{"prompt": prompt} for prompt in prompts]
        available = self.rewards.arguments(latents, rows, conditioning, seeds)
        columns = [differentiable_score(function, available, len(latents)) for function in self.functions]
        return torch.stack(columns, dim=1) @ self.weights.to(latents.device)

    def unit(self, noise_level: float | None) -> float:
        """Scale of the scores at a level: ``sqrt(2 sum_i w_i^2 var_i)``, the deviation of a difference of two scores.

        ``var_i`` is the variance of the noise-calibrated likelihood (arXiv 2602.11146) of each `LatentReward`; other
        callables have none, and without any the unit is 1.

        Args:
            noise_level: of the states; ``None``: clean latents, which are scored at the reward's own level.
        """
        variance = 0.0
        for function, weight in zip(self.functions, self.weights.tolist(), strict=True):
            reward = unwrapped(function)
            model = reward.preference_model if isinstance(reward, LatentReward) else None
            if isinstance(reward, LatentReward) and isinstance(model, ThurstoneModel):
                level = self._own_level(reward) if noise_level is None else torch.tensor(noise_level)
                variance += weight**2 * float(model.variance(level))
        return math.sqrt(2 * variance) if variance else 1.0

    def probability(self, better: Tensor, worse: Tensor, noise_level: float | None) -> Tensor:
        """Probability that the first of two scores is rightly the higher one, ``Phi((a - b) / unit)``, elementwise."""
        return torch.special.ndtr((better - worse) / self.unit(noise_level))

    @property
    def is_calibrated(self) -> bool:
        """Whether some reward knows how uncertain its scores are."""
        rewards = [unwrapped(function) for function in self.functions]
        return any(isinstance(r, LatentReward) and isinstance(r.preference_model, ThurstoneModel) for r in rewards)

    def _own_level(self, reward: LatentReward) -> Tensor:
        level = self.rewards.settings.get("noise_level")
        return ensemble_level(torch.as_tensor(reward.config.noise_level if level is None else level))

    def _weighted(self, scores: Tensor) -> Tensor:
        """Sum over the rewards that apply to a row."""
        applies = ~scores.isnan()
        total = scores.nan_to_num(0.0).float() @ self.weights
        return total.where(applies.any(dim=1), -torch.inf)
