"""Scores of preference pairs at several noise levels and for an ensemble, with fixed noise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dina_reward.checks.values import check_choice, check_flags, check_kind, check_numbers_list, checked_int
from dina_reward.data.records import PreferenceBatch, collate_preferences
from dina_reward.evaluation.columns import plain_columns, select_columns
from dina_reward.likelihood import PreferenceModel, ensemble_level
from dina_reward.noise.draws import fold_seed


if TYPE_CHECKING:
    from dina_reward.reward import LatentReward

ENSEMBLE = "ensemble"


def _check_levels(name: str, levels: Sequence[float]) -> None:
    check_numbers_list(name, levels)
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"{name} must lie in [0, 1], got {levels}")
    if len(set(levels)) != len(levels):
        raise ValueError(f"{name} repeats a level: {levels}")


@dataclass(frozen=True)
class PairProtocol:
    """How pairs are scored: every listed level on its own, and one ensemble. A column of results is called a *setting*.

    Both sides of a pair see the same noise, which depends on the seed and the pair's position in the dataset alone.

    Args:
        noise_levels: levels, each evaluated on its own.
        ensemble_levels: levels of the ensemble, or ``None`` for no ensemble.
        ensemble: ``"tokens"`` or ``"mean"``, see `LatentReward.score`.
        seed: seed of the noise.
    """

    noise_levels: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    ensemble_levels: tuple[float, ...] | None = (0.2, 0.5, 0.7)
    ensemble: Literal["tokens", "mean"] = "tokens"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_levels("noise_levels", self.noise_levels)
        if self.ensemble_levels is not None:
            _check_levels("ensemble_levels", self.ensemble_levels)
        if not self.noise_levels and not self.ensemble_levels:
            raise ValueError("nothing to evaluate: give noise_levels, ensemble_levels or both")
        check_choice("ensemble", self.ensemble, ("tokens", "mean"))
        checked_int("seed", self.seed, -(2**63), 2**64 - 1)

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings: the levels, then ``"ensemble"``."""
        return (*(f"{level:g}" for level in self.noise_levels), *([ENSEMBLE] if self.ensemble_levels else []))

    @property
    def levels(self) -> Tensor:
        """The level that each setting's likelihood is taken at, shape ``(settings,)``; see `ensemble_level`."""
        groups = [(level,) for level in self.noise_levels] + ([self.ensemble_levels] if self.ensemble_levels else [])
        return torch.stack([ensemble_level(torch.tensor(levels)) for levels in groups])


@dataclass(frozen=True)
class PairScores:
    """Scores of a dataset of pairs.

    Args:
        chosen, rejected (`Tensor`): scores, shape ``(pairs, settings)``, float32, on the CPU.
        p_chosen (`Tensor`): labels, shape ``(pairs,)``.
        protocol (`PairProtocol`): how they were made; names the settings.
        preference_model (`PreferenceModel`): the reward's likelihood.
        prompts: one per pair, where they are known; pairs of one prompt are resampled together.
        columns: by name, further columns of the dataset, one value per pair.
    """

    chosen: Tensor
    rejected: Tensor
    p_chosen: Tensor
    protocol: PairProtocol
    preference_model: PreferenceModel
    prompts: Sequence[str] = ()
    columns: Mapping[str, Sequence[object]] = field(default_factory=dict)

    @property
    def margins(self) -> Tensor:
        """Chosen minus rejected score, shape ``(pairs, settings)``."""
        return self.chosen - self.rejected

    @property
    def probabilities(self) -> Tensor:
        """Predicted probability that ``chosen`` is preferred, shape ``(pairs, settings)``."""
        columns = zip(self.chosen.T, self.rejected.T, self.protocol.levels, strict=True)
        return torch.stack([self.preference_model.probability(*column) for column in columns], dim=1)

    def column(self, setting: str) -> int:
        """Column of a setting.

        Raises:
            ValueError: there is no such setting.
        """
        if setting not in self.protocol.settings:
            raise ValueError(f"no setting {setting!r}; this evaluation has {', '.join(self.protocol.settings)}")
        return self.protocol.settings.index(setting)

    def select(self, pairs: Tensor) -> PairScores:
        """The scores of some of the pairs, with their prompts and columns.

        Args:
            pairs: which ones, bool, shape ``(pairs,)``.
        """
        rows = pairs.nonzero().flatten().tolist()
        return replace(
            self,
            chosen=self.chosen[pairs],
            rejected=self.rejected[pairs],
            p_chosen=self.p_chosen[pairs],
            prompts=[self.prompts[row] for row in rows] if self.prompts else (),
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
        )


@torch.no_grad()
def score_batch(
    reward: LatentReward, batch: PreferenceBatch, protocol: PairProtocol, first_position: int
) -> tuple[Tensor, Tensor]:
    """Scores one batch of pairs.

    Args:
        reward: the reward.
        batch: collated pairs, on any device.
        protocol: levels, ensemble and seed.
        first_position: position of the batch's first pair in the dataset.

    Returns:
        Scores of the chosen and of the rejected sides, each of shape ``(pairs, settings)``.
    """
    latents = torch.cat([batch["chosen"], batch["rejected"]]).to(reward.device)
    prompts = batch["prompts"] * 2
    seeds = [fold_seed(protocol.seed, first_position + row) for row in range(len(batch["prompts"]))] * 2
    columns = []
    if protocol.noise_levels:
        output = reward.score(latents, prompts, noise_level=protocol.noise_levels, ensemble="mean", seed=seeds)
        columns.append(output.level_scores)
    if protocol.ensemble_levels:
        scores = reward(latents, prompts, noise_level=protocol.ensemble_levels, ensemble=protocol.ensemble, seed=seeds)
        columns.append(scores[:, None])
    chosen, rejected = torch.cat(columns, dim=1).chunk(2)
    return chosen, rejected


def score_pairs(
    reward: LatentReward,
    pairs: Iterable[Mapping[str, Any]],
    protocol: PairProtocol | None = None,
    *,
    columns: Sequence[str] = (),
    batch_size: int = 8,
    progress: bool = True,
) -> PairScores:
    """Scores a dataset of preference records.

    Args:
        reward: the reward.
        pairs: preference records (see `dina_reward.data`): a dataset, a list, any iterable.
        protocol: levels, ensemble and seed; defaults to the published benchmark's levels.
        columns: columns of the dataset to keep beside the scores, for `report_from_scores`.
        batch_size: pairs per batch; does not change results.
        progress: show a progress bar.

    Raises:
        ValueError: no pairs, an unusable record, or a column that the first record lacks.
    """
    protocol = PairProtocol() if protocol is None else protocol
    check_kind("protocol", protocol, PairProtocol)
    if not hasattr(reward, "prompt_encoder") or isinstance(reward, type):
        raise ValueError(f"reward must be a LatentReward, got {reward!r:.80} ({type(reward).__name__})")
    iterable = hasattr(type(pairs), "__iter__") or hasattr(type(pairs), "__getitem__")
    if not iterable or isinstance(pairs, (str, bytes, Mapping, type)):
        raise ValueError(f"pairs must be preference records, got {pairs!r:.80} ({type(pairs).__name__})")
    batch_size = checked_int("batch_size", batch_size, 1)
    check_flags(progress=progress)
    total = len(pairs) if isinstance(pairs, Sized) else None
    chosen, rejected, p_chosen, position = [], [], [], 0
    prompts: list[str] = []
    kept: dict[str, list[object]] = {name: [] for name in columns}
    with tqdm(total=total, desc="scoring pairs", unit="pair", disable=not progress) as bar:
        for records in _batches(pairs, batch_size):
            batch = collate_preferences(records)
            plain = [plain_columns(record) for record in records] if columns else []
            if plain and not position:
                select_columns(columns, dict.fromkeys(plain[0], ()))
            for name, values in kept.items():
                values.extend(row.get(name) for row in plain)
            prompts.extend(batch["prompts"])
            with reward.prompt_encoder.given(batch["prompts"], batch["conditioning"]):
                scores = score_batch(reward, batch, protocol, position)
            chosen.append(scores[0].cpu())
            rejected.append(scores[1].cpu())
            p_chosen.append(batch["p_chosen"])
            position += len(records)
            bar.update(len(records))
    if not chosen:
        raise ValueError("got no preference pairs to evaluate")
    return PairScores(
        torch.cat(chosen),
        torch.cat(rejected),
        torch.cat(p_chosen),
        protocol,
        reward.preference_model,
        prompts,
        kept,
    )


def _batches(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
